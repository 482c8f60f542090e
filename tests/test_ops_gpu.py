"""The kernels on a GPU: shapes of models, and sizes past 2^31 and 65,535.

Errors are judged by `ophis.testing.check` where the reference in float64 takes seconds at most. A call that a backend
cannot run is skipped with the backend's own reason.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from gpu_cases import DEVICE, KERNELS, NAMES, OF_SCAN, OF_SSD, PAIRS, RECURRENT, case, checked, fullest, skip_unless
from ophis.ops import OPS
from ophis.testing import assert_close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation:UserWarning"),
]


@pytest.mark.parametrize("name", NAMES)
def test_there_are_kernels(name: str):
    """Everything below skips what a backend cannot run: something must."""
    reasons = OPS[name].explain(**fullest(name, dtype=torch.bfloat16))
    assert any(reasons.get(kernel, "absent") is None for kernel in KERNELS), reasons


# Shapes of models


@pytest.mark.parametrize("sizes", [dict(b=3, length=777, d=1536), dict(b=1, length=2049, d=2048)], ids=str)
@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_odd_lengths(name: str, backend: str, sizes: dict[str, int]):
    more = {"selective_scan": {"n": 16}, "ssd": {"n": 128}}.get(name, {})
    checked(name, backend, fullest(name, dtype=torch.bfloat16, **sizes, **more))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("backend", OF_SCAN)
def test_scan_of_one_long_row(backend: str, dtype: torch.dtype):
    """Too few channels to fill a GPU: the length is what there is to share out."""
    checked("selective_scan", backend, fullest("selective_scan", dtype=dtype, length=5000, b=1, d=96, n=16))


@pytest.mark.parametrize(("n", "g"), [(1, 1), (8, 2), (16, 4), (24, 1), (40, 1), (64, 2), (128, 1), (136, 1), (256, 1)])
@pytest.mark.parametrize("backend", OF_SCAN)
def test_scan_of_any_state_size(backend: str, n: int, g: int):
    checked(
        "selective_scan", backend, case("selective_scan", "groups", dtype=torch.bfloat16, length=131, d=256, n=n, g=g)
    )


@pytest.mark.parametrize("length", (1, 130, 3000))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(("name", "backend"), RECURRENT)
def test_strong_decay(name: str, backend: str, dtype: torch.dtype, length: int):
    """Rates of 0.01 to 1000 and steps of 0.0001 to 100: exponents down to -1e5, and of 1e-6 beside them."""
    sizes = dict(d=96, n=16) if name == "selective_scan" else dict(d=512)
    inputs = case(name, "plain", dtype=dtype, length=length, b=1, **sizes)
    generator = torch.Generator().manual_seed(2)
    rates, steps = (torch.rand(t.shape, generator=generator).to(DEVICE) for t in (inputs["A"], inputs["dt"]))
    inputs.update(A=-(10 ** (5 * rates - 2)), dt=(10 ** (6 * steps - 4)).to(dtype), x=inputs["x"] / 64)
    checked(name, backend, inputs)


@pytest.mark.parametrize(
    "sizes", [dict(n=16), dict(n=64, g=2), dict(n=128), dict(n=80, p=48), dict(n=256, p=128)], ids=str
)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("backend", OF_SSD)
def test_ssd_of_any_size(backend: str, dtype: torch.dtype, sizes: dict[str, int]):
    checked("ssd", backend, fullest("ssd", dtype=dtype, length=333, d=384, **sizes))


@pytest.mark.parametrize("which", ("everything", "step limits"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("backend", OF_SSD)
def test_ssd_with_its_other_options(backend: str, dtype: torch.dtype, which: str):
    checked("ssd", backend, case("ssd", which, dtype=dtype, length=500, d=512, n=128))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("backend", OF_SSD)
def test_ssd_of_one_long_row(backend: str, dtype: torch.dtype):
    """In segments, forward and backward."""
    checked("ssd", backend, fullest("ssd", dtype=dtype, length=5000, b=1, d=128, n=128))


@pytest.mark.parametrize("width", (1, 100, 2560, 20000))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(("name", "backend"), [pair for pair in PAIRS if "norm" in pair[0]])
def test_norms_of_any_width(name: str, backend: str, dtype: torch.dtype, width: int):
    """Rows in plenty for every program, and tiles too large for two of them to lie in shared memory."""
    checked(name, backend, fullest(name, dtype=dtype, b=2, length=1001, d=width))


@pytest.mark.parametrize("lengths", [(1, 0, 777, 0, 1, 1, 1020, 200), (5, 3000, 60)], ids=str)
@pytest.mark.parametrize(("name", "backend"), [pair for pair in PAIRS if "norm" not in pair[0]])
def test_packed_sequences(name: str, backend: str, lengths: tuple[int, ...]):
    offsets = list(itertools.accumulate(lengths, initial=0))
    inputs = case(name, "packed", dtype=torch.bfloat16, length=offsets[-1], d=256 if name == "ssd" else 192)
    state = inputs["initial_state"]
    inputs["initial_state"] = torch.randn(len(lengths), *state.shape[1:], device=DEVICE)
    inputs["cu_seqlens"] = torch.tensor(offsets, dtype=torch.int32, device=DEVICE)
    checked(name, backend, inputs)


@pytest.mark.parametrize("backend", OF_SCAN)
def test_scan_of_packed_sequences_of_many_channels(backend: str):
    """Enough for 16 on each multiprocessor of an H100, in a relay: sequences start in the midst of a leg."""
    lengths = (1, 0, 777, 0, 1, 1, 520, 100)
    offsets = list(itertools.accumulate(lengths, initial=0))
    inputs = case("selective_scan", "packed", dtype=torch.bfloat16, length=offsets[-1], d=1600, n=16)
    inputs["initial_state"] = torch.randn(len(lengths), *inputs["initial_state"].shape[1:], device=DEVICE)
    inputs["cu_seqlens"] = torch.tensor(offsets, dtype=torch.int32, device=DEVICE)
    checked("selective_scan", backend, inputs)


@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_slices_of_projections(name: str, backend: str):
    """As a layer gives them: x and z halves of one projection, B and C parts of another, which begin anywhere."""
    inputs = fullest(name, dtype=torch.bfloat16, length=500, d=320)
    for key in {"x", "z", "dt", "B", "C", "residual"} & set(inputs):
        t = inputs[key]
        wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 3), torch.nan)
        inputs[key] = wide[..., 1 : 1 + t.shape[-1]].copy_(t)
    checked(name, backend, inputs)


@pytest.mark.parametrize(
    "dtypes",
    [
        dict(
            x=torch.bfloat16, dt=torch.float32, B=torch.bfloat16, C=torch.bfloat16, z=torch.bfloat16
        ),  # under autocast
        dict(x=torch.float32, dt=torch.bfloat16, B=torch.float16, C=torch.float32, z=torch.bfloat16),
        dict(x=torch.float16, dt=torch.float16, B=torch.float32, C=torch.float16, z=torch.float32),
    ],
    ids=lambda dtypes: " ".join(f"{k}={str(v).removeprefix('torch.')}" for k, v in dtypes.items()),
)
@pytest.mark.parametrize(("name", "backend"), RECURRENT)
def test_mixed_dtypes(name: str, backend: str, dtypes: dict[str, torch.dtype]):
    inputs = fullest(name, length=300, d=128, n={"selective_scan": 16, "ssd": 128}[name])
    checked(name, backend, {k: v.to(dtypes[k]) if k in dtypes else v for k, v in inputs.items()})


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize(("name", "backend"), [pair for pair in PAIRS if pair not in RECURRENT])
def test_weights_of_another_dtype(name: str, backend: str, dtypes: tuple[torch.dtype, torch.dtype]):
    inputs = fullest(name, dtype=dtypes[0], length=300, d=128)
    checked(name, backend, {k: v.to(dtypes[1]) if k in ("weight", "bias", "z") else v for k, v in inputs.items()})


# Sizes that a 32-bit integer or a grid's second axis does not hold


@pytest.mark.parametrize("sizes", [dict(b=70_000, length=4, d=8), dict(b=1, length=5, d=70_016)], ids=str)
@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_more_than_65535(name: str, backend: str, sizes: dict[str, int]):
    more = dict(dtype=torch.bfloat16, d=max(sizes["d"], 64)) if name == "ssd" else {}
    checked(name, backend, fullest(name, **{**sizes, **more}))


@pytest.mark.parametrize("sliced", (False, True))
@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_more_than_2_to_the_31(name: str, backend: str, sliced: bool):
    """The last positions, and their gradients, against the same call on the last positions alone.

    What is before them is forgotten: 2048 positions with a mean step of 0.02 and rates of at least 1. Either x has more
    than 2^31 elements, or it is a slice of something that has.
    """
    d, wide, last = (64, 2048, 4096) if sliced else (256, 256, 4096)
    l = 2**31 // wide + 1000
    without = {"initial_state", "dt_bias", "dt_softplus", "z" if name in ("selective_scan", "ssd") else ""}
    small = {k: v for k, v in fullest(name, length=2, b=1, d=d).items() if k not in without}
    inputs, parts = {}, {}  # what has no positions, and what has
    for key, value in small.items():
        if not isinstance(value, Tensor) or value.ndim < (2 if key == "dt" else 3):
            inputs[key] = value
            continue
        width = value[0, 0].numel()
        drawn = torch.empty(1, l, wide if key == "x" else width, dtype=torch.bfloat16, device=DEVICE)
        drawn.uniform_(1e-3, 0.04) if key == "dt" else drawn.normal_()
        parts[key] = drawn[..., :width].unflatten(-1, value.shape[2:])
    skip_unless(name, backend, {**inputs, **parts})
    dy = torch.empty(1, last, *small["x"].shape[2:], dtype=torch.bfloat16, device=DEVICE).normal_()

    def run(part: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        leaves = {k: v.detach().requires_grad_() for k, v in part.items()}
        y = OPS[name](**inputs, **leaves, backend=backend)
        y = y[0] if isinstance(y, tuple) else y
        # Only the last positions have a gradient; it flows back from them.
        weight = torch.zeros(y.shape, dtype=y.dtype, device=DEVICE)
        weight[:, -last:] = dy
        gradients = torch.autograd.grad(y, list(leaves.values()), weight)
        return y[:, -2048:].detach().clone(), [g[:, -2048:].clone() for g in gradients]

    y, gradients = run(parts)
    y_last, gradients_last = run({k: v[:, -last:] for k, v in parts.items()})
    assert_close(y, y_last, name="y")
    for key, actual, expected in zip(parts, gradients, gradients_last, strict=True):
        assert_close(actual, expected, name=f"grad {key}")


@pytest.mark.parametrize(("name", "backend"), RECURRENT)
def test_what_no_kernel_takes_is_an_error_that_says_who_can(name: str, backend: str):
    inputs = case(name, "plain", n=300)
    with pytest.raises(RuntimeError, match=r"n=300\b.*These can: torch, reference"):
        OPS[name](**inputs, backend=backend)
    y, _ = OPS[name](**inputs)
    assert y.isfinite().all()
