"""SSD in chunks: the four steps of Dao and Gu 2024 (section 6, listing 1) as matrix products.

b batch  c chunks  q positions in a chunk (i, j two of them)  g groups  r heads a group  p head width  n state width
"""

from __future__ import annotations

import torch
from torch import Tensor

from ophis.ops.in_place import check_in_place
from ophis.ops.selective_scan import finish, state_dtype
from ophis.ops.ssd import per_head, ssd, ssd_step
from ophis.ops.step_size import step_size
from ophis.ops.torch.packing import sequence_of

CHUNK = 64  # positions; also the number of chunks whose states are passed on by one matrix product


@ssd.register("torch")
def chunked(x, dt, A, B, C, *, D, z, dt_bias, dt_softplus, dt_limit, initial_state, cu_seqlens):
    wide = torch.promote_types(x.dtype, torch.float32)
    u, dt = x.to(wide), step_size(dt.to(wide), dt_bias, dt_softplus, dt_limit)
    B, C = B.to(wide), C.to(wide)
    if initial_state is None:
        rows = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        initial_state = u.new_zeros(rows, *x.shape[2:], B.shape[-1])
    run = step if x.shape[1] == 1 and cu_seqlens is None else chunks
    y, state = run(u, dt, A, B, C, initial_state.to(wide), cu_seqlens)
    return finish(y, u, per_head(D), z).to(x.dtype), state


@ssd_step.register("torch")
def step_in_place(x, dt, A, B, C, state, *, D, z, dt_bias, dt_softplus, dt_limit):
    """In the state's own memory: a new state each time, 0.8 MB of 24 x 64 x 128, takes 1.5 times as long."""
    check_in_place("ssd_step", state, x, dt, A, B, C, D, z, dt_bias)
    after = state.to(state_dtype(x, state))  # the state itself where it is as wide
    u, dt = x.to(after.dtype), step_size(dt.to(after.dtype), dt_bias, dt_softplus, dt_limit)
    B, C = B.to(after.dtype)[:, :, None, None], C.to(after.dtype)[..., None]
    h = after.unflatten(1, (B.shape[1], -1))  # b g r p n
    h.mul_(torch.exp(dt * A).view(*h.shape[:3], 1, 1))
    h.addcmul_((dt[..., None] * u).view(*h.shape[:4], 1), B)
    y = (h.flatten(2, 3) @ C).view(x.shape)
    if after is not state:
        state.copy_(after)
    return finish(y, u, per_head(D), z).to(x.dtype)


def step(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One position of each sequence: the recurrence itself, on (b, g, r, p, n)."""
    b, _, h, p = u.shape
    g, n = B.shape[2:]
    decay = torch.exp(dt[:, 0] * A).view(b, g, -1, 1, 1)
    inflow = (dt[:, 0, :, None] * u[:, 0]).view(b, g, -1, p, 1) * B.view(b, g, 1, 1, n)
    state = inflow.addcmul_(decay, state.view(b, g, -1, p, n))  # in the inflow's memory: new pages cost more than it
    y = state.flatten(2, 3) @ C.reshape(b, g, n, 1)
    return y.view(b, 1, h, p), state.view(b, h, p, n)


def chunks(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    b, l, h, p = u.shape
    g, n = B.shape[2:]
    layout = Dense(l) if cu_seqlens is None else Packed(l, cu_seqlens)
    fold = layout.fold
    U = fold(u * dt[..., None]).unflatten(3, (g, -1))  # b c q g r p
    B, C = fold(B).transpose(2, 3), fold(C).transpose(2, 3)  # b c g q n
    decays = accumulate(fold(dt * A), dim=2)  # b c q h: the log of the decay since the chunk's start
    within = decays.unflatten(3, (g, -1)).permute(0, 1, 3, 4, 2)  # b c g r q

    # 1. Within a chunk, the quadratic form: (L ∘ C B^T) u, with L = exp(segment sums), zero above the diagonal.
    above = torch.ones(within.shape[-1], within.shape[-1], dtype=torch.bool, device=u.device).triu(1)
    L = (within[..., :, None] - within[..., None, :]).masked_fill(above, -torch.inf).to(u.dtype).exp()
    y = ((C @ B.mT)[:, :, :, None] * L) @ U.permute(0, 1, 3, 4, 2, 5)  # b c g r q p

    # 2. What each chunk adds to the state at its end.
    to_end = torch.exp((decays[:, :, -1:] - decays).to(u.dtype)).unflatten(3, (g, -1))[..., None]
    inflow = (U * to_end).permute(0, 1, 3, 4, 5, 2).flatten(3, 4) @ B  # b c g rp n
    inflow = inflow.reshape(b, -1, h, p, n)

    # 3. The states at the chunks' ends: a recurrence over the chunks.
    total = decays[:, :, -1]  # b c h
    inflow = layout.admit(inflow, total.to(u.dtype).exp()[..., None, None], initial_state)
    states = carry(total, inflow, layout.sequences)

    # 4. What the state at a chunk's start adds to its outputs.
    before = layout.before(states, initial_state).unflatten(2, (g, -1)).flatten(3, 4)  # b c g rp n
    from_start = torch.exp(within.to(u.dtype))[..., None]
    y = y + from_start * (C @ before.mT).unflatten(4, (-1, p)).transpose(3, 4)
    y = layout.unfold(y.permute(0, 1, 4, 2, 3, 5).flatten(3, 4))
    return y, layout.ends(states, initial_state)


def accumulate(logs: Tensor, dim: int) -> Tensor:
    """Running sums of log decays, in float64 where there is one.

    A decay between two positions is a difference of two running sums, and cancellation there turns into relative
    error after exp: 6e-5 at length 256 in float32, anything at all after one strong decay (a sum of 1e6 has no
    digits left for a difference of 0.01). The sums are a p-th of the data, so float64 costs nothing that shows.
    """
    wide = torch.float32 if logs.device.type == "mps" else torch.float64
    return logs.to(wide).cumsum(dim)


def carry(logs: Tensor, inflow: Tensor, sequences: Tensor | None) -> Tensor:
    """H_c = exp(logs_c) H_{c-1} + inflow_c over chunks: (b c h), (b c h p n) -> (b c h p n).

    `sequences`, (b or 1, c), says which sequence a chunk belongs to; the state does not pass from one to the next.
    One matrix product for CHUNK chunks; for more, blocks of CHUNK by themselves and then the recurrence of blocks.
    """
    b, c, h = logs.shape
    if c > CHUNK:
        fill = -c % CHUNK
        blocks = (c + fill) // CHUNK
        logs = torch.nn.functional.pad(logs, (0, 0, 0, fill)).reshape(b * blocks, CHUNK, h)
        inflow = torch.nn.functional.pad(inflow, (0, 0, 0, 0, 0, 0, 0, fill))
        inner_sequences = last = None
        if sequences is not None:
            filled = torch.cat([sequences, sequences[:, -1:].expand(-1, fill)], 1)
            inner_sequences = filled.view(-1, CHUNK)
            last = inner_sequences[:, -1].view(-1, blocks)
        inner = carry(logs, inflow.reshape(b * blocks, CHUNK, *inflow.shape[2:]), inner_sequences)
        since = accumulate(logs, 1)
        # The total decay of a block, over a boundary or not: `last` keeps the blocks of one sequence apart.
        ends = carry(since[:, -1].unflatten(0, (b, blocks)), inner[:, -1].unflatten(0, (b, blocks)), last)
        before = torch.cat([torch.zeros_like(ends[:, :1]), ends[:, :-1]], 1).reshape(b * blocks, 1, *inner.shape[2:])
        passed = since.to(inner.dtype).exp()
        if inner_sequences is not None and last is not None:
            previous = torch.cat([last[:, :1], last[:, :-1]], 1).view(-1, 1)
            passed = passed * (inner_sequences == previous)[..., None]
        return (inner + passed[..., None, None] * before).reshape(b, c + fill, *inner.shape[2:])[:, :c]
    since = accumulate(logs, 1).transpose(1, 2)  # b h c
    hidden = torch.ones(c, c, dtype=torch.bool, device=logs.device).triu(1)
    if sequences is not None:
        hidden = (hidden | (sequences[:, :, None] != sequences[:, None, :]))[:, None]
    decay = (since[..., :, None] - since[..., None, :]).masked_fill(hidden, -torch.inf).to(inflow.dtype).exp()
    return (decay @ inflow.transpose(1, 2).flatten(3)).unflatten(3, inflow.shape[3:]).transpose(1, 2)


class Dense:
    """Sequences of one length, (b, l, ...) <-> (b, c, q, ...), the last chunk filled with zeros: steps of size 0."""

    sequences = None

    def __init__(self, l: int):
        self.l = l
        self.q = CHUNK if l >= CHUNK else l
        self.chunks = (l + self.q - 1) // self.q

    def fold(self, t: Tensor) -> Tensor:
        fill = self.chunks * self.q - self.l  # -l % q, in the form that halves the time of tracing it for any l
        if fill:
            t = torch.cat([t, t.new_zeros(t.shape[0], fill, *t.shape[2:])], 1)
        return t.unflatten(1, (self.chunks, self.q))

    def unfold(self, t: Tensor) -> Tensor:
        return t.flatten(1, 2)[:, : self.l]

    def admit(self, inflow: Tensor, decay: Tensor, initial_state: Tensor) -> Tensor:
        """The initial state as part of the first chunk's inflow."""
        return torch.cat([inflow[:, :1] + decay[:, :1] * initial_state[:, None], inflow[:, 1:]], 1)

    def before(self, states: Tensor, initial_state: Tensor) -> Tensor:
        """The state at each chunk's start, of those at their ends."""
        return torch.cat([initial_state[:, None], states[:, :-1]], 1)

    def ends(self, states: Tensor, initial_state: Tensor) -> Tensor:
        return states[:, -1].clone()  # a view would keep every chunk's state in memory


class Packed:
    """Packed sequences, each given chunks of its own: at most l/q + s of them, so that no length is read back."""

    def __init__(self, l: int, cu_seqlens: Tensor):
        sequences = len(cu_seqlens) - 1
        self.q = CHUNK if l >= CHUNK else l
        self.chunks = l // self.q + sequences
        lengths = cu_seqlens.diff().long()
        self.counts = (lengths + self.q - 1) // self.q
        self.first = self.counts.cumsum(0) - self.counts
        of_token = sequence_of(cu_seqlens, l)
        self.places = torch.arange(l, device=cu_seqlens.device) + (self.first * self.q - cu_seqlens[:-1])[of_token]
        chunk = torch.arange(self.chunks, device=cu_seqlens.device)
        # Chunks past the last sequence's are empty; they count to it and are never read.
        self.sequence = torch.searchsorted(self.first + self.counts, chunk, right=True).clamp(max=sequences - 1)
        self.sequences = self.sequence[None]
        self.starts = (chunk == self.first[self.sequence])[:, None, None, None]

    def fold(self, t: Tensor) -> Tensor:
        empty = t.new_zeros(1, self.chunks * self.q, *t.shape[2:])
        return empty.index_copy(1, self.places, t).unflatten(1, (-1, self.q))

    def unfold(self, t: Tensor) -> Tensor:
        return t.flatten(1, 2).index_select(1, self.places)

    def admit(self, inflow: Tensor, decay: Tensor, initial_state: Tensor) -> Tensor:
        return torch.where(self.starts, inflow + decay * initial_state[self.sequence], inflow)

    def before(self, states: Tensor, initial_state: Tensor) -> Tensor:
        return torch.where(self.starts, initial_state[self.sequence], torch.cat([states[:, :1], states[:, :-1]], 1))

    def ends(self, states: Tensor, initial_state: Tensor) -> Tensor:
        last = (self.first + self.counts - 1).clamp(min=0)
        return torch.where((self.counts > 0)[:, None, None, None], states[0, last], initial_state)
