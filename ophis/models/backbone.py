"""A stack of blocks from a tiled pattern of mixers; what every model of this library is built on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ophis.layers import S4D, Attention, Block, GatedMLP, Mamba, Mamba2

if TYPE_CHECKING:
    from ophis.models.config import LanguageModelConfig

MIXERS: dict[str, type[nn.Module]] = {"mamba": Mamba, "mamba2": Mamba2, "attention": Attention, "s4d": S4D}


def blocks(config: LanguageModelConfig) -> nn.ModuleList:
    """One `Block` for each of `config.mixers`."""
    width = config.hidden_size
    layers = nn.ModuleList(
        Block(
            width,
            MIXERS[kind](width, **config.options(kind)),
            GatedMLP(width, d_hidden=config.intermediate_size) if config.intermediate_size else None,
            eps=config.norm_eps,
            residual_in_fp32=config.residual_in_fp32,
        )
        for kind in config.mixers
    )
    # GPT-2's scheme: what is added to the residual stream starts smaller, the more there are that add to it.
    for layer in layers:
        outputs = [m for name, m in layer.named_modules() if name in ("mixer.out_proj", "mlp.fc2")]
        for output in outputs:
            output.residual_scale = (len(outputs) * len(layers)) ** -0.5
    return layers


def run(
    layers: nn.ModuleList,
    x: Tensor,
    states: Sequence[Any] | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    call: Callable[..., Any] | None = None,
    outputs: list[Tensor] | None = None,
) -> tuple[Tensor, tuple[Any, ...]]:
    """x (b, l, width) through the blocks, each from its state -> (b, l, width), their states after it.

    `call(layer, *arguments)` may stand between, as gradient checkpointing does. `outputs` collects every block's input.
    """
    if cu_seqlens is not None and not x.shape[1]:  # nothing but padding: no layer runs, no state changes
        if outputs is not None:
            outputs.extend([x] * len(layers))
        sequences = len(cu_seqlens) - 1
        return x, tuple(states or (layer.initial_state(sequences) for layer in layers))  # type: ignore[operator]
    after = []
    for i, layer in enumerate(layers):
        if outputs is not None:
            outputs.append(x)
        state = None if states is None else states[i]
        if call is None:
            x, state = layer(x, state, cu_seqlens=cu_seqlens)
        else:
            x, state = call(partial(layer.__call__, cu_seqlens=cu_seqlens), x, state)
        after.append(state)
    return x, tuple(after)
