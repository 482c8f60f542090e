"""`ophis bench mamba mamba2`: whole layers beside the official ones, which may be missing, fail or differ."""

from __future__ import annotations

import csv
import sys
import types
from pathlib import Path

import pytest
import torch

from ophis.bench import layers, plots, shapes, tables, timing
from ophis.cli import main

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def official(cls: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """A stand-in for mamba-ssm's: the same parameters, one output."""

    class Official(cls):
        def forward(self, x):
            return super().forward(x)[0]

    return Official


@pytest.mark.parametrize("name", layers.LAYERS)
def test_layers_beside_the_official_ones(name: str, monkeypatch):
    ours, theirs = layers.LAYERS[name]
    module, _, cls = theirs.partition(":")
    stand_in = types.ModuleType(module)
    setattr(stand_in, cls, official(ours))
    monkeypatch.setitem(sys.modules, module, stand_in)
    assert main(["bench", name, "--quick", "--device", "cpu"]) == 0
    with Path(f"{name}_cpu.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["backend"], row["direction"]) for row in rows] == [
        (side, direction) for direction in plots.DIRECTIONS for side in ("ophis", "mamba-ssm")
    ]
    assert all(row["times_faster"] for row in rows if row["backend"] == "ophis")
    assert Path(f"{name}_cpu.png").read_bytes().startswith(b"\x89PNG")


def test_an_official_layer_that_fails_or_differs_is_named(monkeypatch):
    class Other(official(layers.LAYERS["mamba"][0])):
        def forward(self, x):
            return 1.2 * super().forward(x)

    class Failing(official(layers.LAYERS["mamba"][0])):
        def forward(self, x):
            raise RuntimeError("no kernel\nimage")

    class FailingBackward(official(layers.LAYERS["mamba"][0])):
        def forward(self, x):
            y = super().forward(x)
            return y.detach() if torch.is_grad_enabled() else y

    def not_here(*_, **__):
        raise AssertionError("no convolution")

    for cls, text, rows in (
        (Other, "ophis and mamba-ssm differ by ", 4),
        (Failing, "mamba-ssm fails: RuntimeError: no kernel", 2),
        (FailingBackward, "mamba-ssm fails: RuntimeError: element 0 of tensors does not require grad", 3),
        (not_here, "mamba-ssm fails: AssertionError: no convolution", 2),
    ):
        monkeypatch.setattr(layers, "imported", lambda _, cls=cls: (cls, ""))
        found = list(layers.run("mamba", CPU, quick=True))
        (note,) = [item for item in found if isinstance(item, tables.Note)]
        assert note.text.startswith(f"2 x 64 x 32: {text}")
        assert [row["backend"] for row in found if isinstance(row, dict)].count("ophis") == 2
        assert len(found) == rows + 1


def test_a_layer_that_is_slow_or_too_large_is_left_out(monkeypatch):
    monkeypatch.setattr(timing, "seconds", lambda call, device: 1.5)
    *_, note = layers.run("mamba", CPU, quick=True)
    assert note == tables.Note("2 x 64 x 32: it would take 2 s a call, and is left out")

    def out_of_memory(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(timing, "seconds", out_of_memory)
    *_, note = layers.run("mamba", CPU, quick=True)
    assert note == tables.Note("2 x 64 x 32: more memory than cpu has")


def test_what_a_layer_must_at_least_do():
    mamba = layers.LAYERS["mamba"][0](32)  # 64 channels, rank 2, n 16, float32
    x = torch.zeros(2, 64, 32)
    linears, others = 32 * 128 + 64 * (2 + 32) + 2 * 64 + 64 * 32, 64 * (4 + 1 + 1 + 16 + 1)
    done = layers.least(mamba, x, shapes.FORWARD)
    assert done == (4 * (2 * 128 * 32 + linears + others), 128 * 64 * (16 + 3), 2 * 128 * linears)
    twice = layers.least(mamba, x, shapes.TRAINING)
    assert twice == (4 * (5 * 128 * 32 + 3 * (linears + others)), 2 * done.exponentials, 3 * done.flops)
    mamba2 = layers.LAYERS["mamba2"][0](32)  # a head of 64, n 128
    of_ssd = shapes.products("ssd", {"x": torch.zeros(2, 64, 1, 64), "B": torch.zeros(2, 64, 1, 128)}, shapes.FORWARD)
    linears = 32 * (64 + (64 + 256) + 1) + 64 * 32
    assert layers.least(mamba2, x, shapes.FORWARD).flops == 2 * 128 * linears + of_ssd


def test_a_name_that_is_neither_and_a_backend_of_a_layer(capsys):
    assert main(["bench", "mamba3"]) == 2
    assert "no operator or layer 'mamba3' to measure; there are selective_scan, " in capsys.readouterr().err
    assert main(["bench", "mamba", "--backend", "torch"]) == 2
    assert "--backend is for operators" in capsys.readouterr().err
