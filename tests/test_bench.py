"""`ophis bench OP`: what it counts, that it refuses to time what is wrong, its tables and its plots."""

from __future__ import annotations

import csv
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from ophis.bench import language_models, ops, peers, plots, shapes, tables, timing
from ophis.bench.provenance import write_csv
from ophis.cli import main
from ophis.ops import OPS
from ophis.ops._op import Backend
from ophis.testing import STEPS

CPU = torch.device("cpu")
PUBLISHED = Path(__file__).parent.parent / "benchmarks" / "peers_h200.csv"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def table(path: str) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def png(path: str) -> bool:
    return Path(path).read_bytes().startswith(b"\x89PNG")


def register(monkeypatch, op: str, name: str, function: Any) -> None:
    assert OPS[op].backends
    monkeypatch.setitem(OPS[op]._backends, name, Backend(name, function, lambda call: None))


def test_a_table_and_its_plots(capsys):
    assert (
        main(["bench", "selective_scan", "--quick", "--device", "cpu", "--backend", "torch", "--out", "new/folder"])
        == 0
    )
    rows = table("new/folder/selective_scan_cpu.csv")
    printed = capsys.readouterr().out
    assert printed.count("torch  ") == len(rows) == 10
    first = rows[0]
    assert ",".join(list(first)[:10]) == "op,case,batch,length,d,n,w,dtype,direction,backend"
    assert ",".join(list(first.values())[:10]) == "selective_scan,gated,2,64,32,4,,bfloat16,forward,torch"
    for row in rows:
        assert 0 < float(row["ms_p20"]) <= float(row["ms_p50"]) <= float(row["ms_p80"])
        assert int(row["bytes"]) > 0
        assert float(row["floor_ms"]) > 0
        assert float(row["share_of_floor"]) == pytest.approx(float(row["floor_ms"]) / float(row["ms_p50"]), rel=0.01)
        assert (row["torch"], row["python"]) == (torch.__version__, sys.version.split()[0])
    for name in ("selective_scan_cpu.png", "selective_scan_cpu_length.png"):
        assert png(f"new/folder/{name}")
        assert name in printed


@pytest.mark.parametrize("op", [op for op in shapes.SHAPES if op not in STEPS])
def test_every_operator_runs(op: str):
    found = list(ops.run(op, CPU, quick=True, backends=["torch"]))
    assert not [item for item in found if isinstance(item, tables.Note)]
    assert len(found) == 2 * len(shapes.shapes_of(op, quick=True))  # forward, forward + backward


@pytest.mark.parametrize("op", [op for op in STEPS if op in shapes.SHAPES])
def test_steps_run_and_are_checked(op: str, monkeypatch):
    """The reference plays a backend, and one that leaves the state as it was another."""
    register(monkeypatch, op, "right", OPS[op].reference)
    register(monkeypatch, op, "idle", lambda state, **call: OPS[op].reference(state=state.clone(), **call))
    found = list(ops.run(op, CPU, quick=True, backends=["right", "idle"]))
    notes = [item for item in found if isinstance(item, tables.Note)]
    assert notes
    assert all(note.wrong and "idle is wrong" in note.text and "state is off by" in note.text for note in notes)
    rows = [row for row in found if isinstance(row, dict)]
    assert [(row["backend"], row["direction"]) for row in rows] == [("right", "forward")] * len(shapes.QUICK[op])


@pytest.mark.parametrize("op", shapes.SHAPES)
def test_shapes_are_there_quick_and_real(op: str):
    for quick in (True, False):
        assert all(shape.op == op for shape in shapes.shapes_of(op, quick))
        assert len(set(map(str, shapes.shapes_of(op, quick)))) >= len(shapes.shapes_of(op, quick)) - 1  # one in float32
    for shape in shapes.shapes_of(op):
        assert shapes.smaller(shape, CPU).keys() == {"b", "l"}
        for device in (CPU, torch.device("cuda")):
            assert all(0 < size <= shape.sizes[letter] for letter, size in shapes.smaller(shape, device).items())


def test_inputs_are_those_of_the_cases_drawn_on_the_device():
    scan, *_ = shapes.shapes_of("selective_scan", quick=True)
    inputs = scan.inputs(CPU)
    assert set(inputs) == {"x", "dt", "A", "B", "C", "D", "z", "dt_bias", "dt_softplus"}
    assert inputs["x"].dtype == torch.bfloat16
    assert inputs["A"].dtype == torch.float32
    steps = torch.nn.functional.softplus(inputs["dt"].float() + inputs["dt_bias"])
    assert 5e-4 < steps.min() < steps.max() < 0.2
    dense, sliced = (shape.inputs(CPU)["x"] for shape in shapes.shapes_of("causal_conv", quick=True))
    assert torch.equal(dense, sliced)
    assert (dense.stride(), sliced.stride()) == ((64 * 32, 32, 1), (64 * 64, 64, 1))


def test_bytes_and_exponentials_by_hand():
    shape, _ = shapes.shapes_of("causal_conv", quick=True)  # 2 x 64 x 32, bfloat16, width 4, silu
    inputs = shape.inputs(CPU)
    outputs = OPS["causal_conv"](**inputs)
    x, parameters, state = 2 * 64 * 32 * 2, 32 * (4 + 1) * 2, 2 * 3 * 32 * 4
    forward = x + parameters + x + state
    assert shapes.bytes_moved("causal_conv", inputs, outputs, shapes.FORWARD) == forward
    backward = x + parameters + x + x + parameters  # reads the inputs and dy, writes dx and the parameters' gradients
    assert shapes.bytes_moved("causal_conv", inputs, outputs, shapes.TRAINING) == forward + backward
    assert shapes.exponentials("causal_conv", inputs, shapes.FORWARD) == 2 * 64 * 32

    scan, *_ = shapes.shapes_of("selective_scan", quick=True)  # 2 x 64 x 32, n 4, softplus and gate
    assert shapes.exponentials("selective_scan", scan.inputs(CPU), shapes.TRAINING) == 2 * (2 * 64 * 32) * (4 + 2)

    ssd, *_ = shapes.shapes_of("ssd", quick=True)  # 2 x 64, 4 heads of 8, n 4: of them 4 n p flops a head and position
    inputs = ssd.inputs(CPU)
    assert shapes.products("ssd", inputs, shapes.FORWARD) == 2 * 64 * (4 * 4 * 8 * 4 + 2 * 64 * (8 * 4 + 4))
    assert shapes.products("ssd", inputs, shapes.TRAINING) == 3 * shapes.products("ssd", inputs, shapes.FORWARD)
    assert shapes.exponentials("ssd", inputs, shapes.FORWARD) == 2 * 64 * 4 * (33 + 1)

    (norm,) = shapes.shapes_of("rms_norm", quick=True)  # 2 x 16 x 64, float32 residual
    inputs = norm.inputs(CPU)
    x, weight = 2 * 16 * 64 * 2, 64 * 2
    forward = x + 2 * x + weight + x + 2 * x
    backward = x + 2 * x + 2 * x + weight + x + 2 * x + weight  # dy, ds and s in; dx, d residual out
    moved = shapes.bytes_moved("rms_norm", inputs, OPS["rms_norm"](**inputs), shapes.TRAINING)
    assert moved == forward + backward


def test_floor():
    assert timing.Limits(copy=4e12, exponentials=4e12).floor(moved=4 * 10**9, exponentials=2 * 10**9) == 1.0
    assert timing.Limits(copy=4e12, exponentials=4e12).floor(moved=4 * 10**9, exponentials=8 * 10**9) == 2.0
    assert timing.Limits(copy=4e12, exponentials=None).floor(moved=4 * 10**9, exponentials=8 * 10**9) == 1.0
    assert timing.Limits(copy=4e12, exponentials=4e12, products=8e14).floor(0, 4 * 10**9, 16 * 10**11) == 2.0


def test_a_wrong_backend_is_not_timed(monkeypatch, capsys):
    torch_norm = next(b.function for b in OPS["gated_rms_norm"].backends if b.name == "torch")
    register(monkeypatch, "gated_rms_norm", "hasty", lambda **call: 1.1 * torch_norm(**call))
    assert main(["bench", "gated_rms_norm", "--quick", "--device", "cpu"]) == 1
    assert "hasty is wrong, and is not timed: gated_rms_norm, backend 'hasty': y is off by" in capsys.readouterr().out
    assert "hasty" not in {row["backend"] for row in table("gated_rms_norm_cpu.csv")}


@pytest.mark.parametrize("direction", (shapes.FORWARD, shapes.TRAINING))
def test_a_backend_that_is_wrong_at_the_full_size_only_is_not_timed(direction: str, monkeypatch):
    """The reference sees one row on a CPU; here the second one is wrong."""
    torch_norm = next(b.function for b in OPS["gated_rms_norm"].backends if b.name == "torch")

    def hasty(**call: Any) -> torch.Tensor:
        y = torch_norm(**call)
        if direction == shapes.TRAINING and y.requires_grad:
            y.register_hook(lambda grad: 1.2 * grad)
        if direction == shapes.FORWARD and len(y) == 2:
            y[1] = 0
        return y

    if direction == shapes.TRAINING:  # right where it is checked, at one row
        monkeypatch.setattr(ops, "_wrong", lambda *_: None)
    register(monkeypatch, "gated_rms_norm", "hasty", hasty)
    found = list(ops.run("gated_rms_norm", CPU, quick=True, backends=["torch", "hasty"]))
    (note,) = [item for item in found if isinstance(item, tables.Note)]
    assert note.wrong
    assert "hasty and torch differ, in " + ("y by" if direction == shapes.FORWARD else "the gradient of x") in note.text
    directions = {row["direction"] for row in found if isinstance(row, dict) and row["backend"] == "hasty"}
    assert direction not in directions


def test_a_slow_backend_is_left_out_and_said_to_be(monkeypatch):
    monkeypatch.setattr(timing, "seconds", lambda call, device: 1.5)
    (note,) = ops.run("gated_rms_norm", CPU, quick=True, backends=["torch"])
    assert isinstance(note, tables.Note)
    assert "torch would take 3 s a call, and is left out" in note.text
    assert not note.wrong


def test_what_a_short_call_takes_whatever_its_length_is_not_multiplied(monkeypatch):
    monkeypatch.setattr(timing, "SLOW", 0.003)
    monkeypatch.setattr(timing, "seconds", lambda call, device: 0.002)
    found = list(ops.run("selective_scan", CPU, quick=True, backends=["torch"], only="1 x 256"))
    assert {row["length"] for row in found if isinstance(row, dict)} == {256}


def test_published_times_are_joined_where_everything_is_the_same():
    rows = tables.read_against(PUBLISHED)
    row = {"op": "selective_scan", "case": "gated", "batch": 16, "length": 2048, "d": 2048, "n": 16, "w": "",
           "dtype": "bfloat16", "direction": "forward"}  # fmt: skip
    found = tables.fastest(row, rows)
    assert found is not None
    assert float(found["ms"]) == 1.17
    assert tables.fastest({**row, "dtype": "float32"}, rows) is None
    assert tables.fastest({**row, "case": "no gate"}, rows) is None
    conv = {**row, "op": "causal_conv", "case": "slice of 2 d", "n": "", "w": 4}
    found = tables.fastest(conv, rows)
    assert found is not None
    assert found["source"].startswith("causal-conv1d, (b, d, l) layout")  # the faster of two


def test_every_published_time_meets_a_shape():
    measured = {
        (shape.op, *(str(shape.sizes.get(letter, "")) for letter in ("b", "l", "d", "n", "w")), direction)
        for op in shapes.SHAPES
        for shape in shapes.shapes_of(op)
        for direction in shape.directions
    }
    for row in tables.read_against(PUBLISHED):
        assert tuple(row[k] for k in ("op", "batch", "length", "d", "n", "w", "direction")) in measured


def test_against_is_a_column(capsys):
    row = 'gated_rms_norm,,,,,,,,forward,1000,"a snail, at rest"'
    Path("snail.csv").write_text(f"{','.join(tables.KEYS)},ms,source\n{row}\n")
    assert main(["bench", "gated_rms_norm", "--quick", "--device", "cpu", "--against", "snail.csv"]) == 0
    assert "times as fast as a snail\n" in capsys.readouterr().out
    forward, training = table("gated_rms_norm_cpu.csv")
    assert forward["against"] == "a snail, at rest"
    assert float(forward["against_times_faster"]) == pytest.approx(1000 / float(forward["ms_p50"]), rel=0.01)
    assert training["against"] == ""


def test_peers_that_cannot_be_used_are_named(monkeypatch):
    absent = peers.Peer("snail", "snail-ssm", "snail_ssm.ops:crawl", lambda function, inputs: (function, inputs))
    broken = types.ModuleType("broken_ssm")  # without the function
    monkeypatch.setitem(sys.modules, "broken_ssm", broken)
    twice = (absent, absent._replace(name="snail, other layout"))
    monkeypatch.setitem(peers.PEERS, "rms_norm", (*twice, absent._replace(package="broken", function="broken_ssm:go")))
    found, missing = peers.peers_of("rms_norm")
    assert not found
    assert missing[0] == "snail-ssm is not installed: its rows are left out"
    assert missing[1].startswith("broken cannot be imported (module 'broken_ssm' has no attribute 'go')")
    assert len(missing) == 2


def test_peers_get_the_same_numbers_in_their_layout(monkeypatch):
    """Stand-ins with the peers' signatures and layouts: (b, d, l), and for the convolution (b, l, d) as a view too."""
    layouts = []

    def scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
        layouts.append([t.is_contiguous() for t in (u, delta, B, C, z)])
        x, dt, B, C, z = (t.transpose(1, 2) for t in (u, delta, B, C, z))
        y, _ = OPS["selective_scan"](
            x, dt, A, B, C, D=D, z=z, dt_bias=delta_bias, dt_softplus=delta_softplus, backend="torch"
        )
        return y.transpose(1, 2)

    def conv(x, weight, bias=None, activation=None):
        layouts.append(x.stride())
        return OPS["causal_conv"](x.transpose(1, 2), weight, bias, activation=activation, backend="torch")[0].mT

    module = types.ModuleType("mamba_ssm.ops.selective_scan_interface")
    module.selective_scan_fn = scan  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    other = types.ModuleType("causal_conv1d")
    other.causal_conv1d_fn = conv  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "causal_conv1d", other)

    for op in ("selective_scan", "causal_conv"):
        shape, *_ = shapes.shapes_of(op, quick=True)
        shape = shape._replace(sizes={**shape.sizes, "d": shape.sizes["l"]})  # no telling the layouts by their shapes
        found, missing = peers.peers_of(op)
        assert not missing
        measured = list(ops._measure(shape, CPU, ["torch"], found, timing.Limits(1e10, None), True, ()))
        assert not [item for item in measured if isinstance(item, tables.Note)]
        rows = [row for row in measured if isinstance(row, dict)]
        assert {row["backend"] for row in rows} == {"torch"} | {peer.name for peer, _ in found}
        for row in rows:
            if row["backend"] == "torch":
                fastest = min(float(r["ms_p50"]) for r in rows
                              if r["backend"] != "torch" and r["direction"] == row["direction"])  # fmt: skip
                assert float(row["peer_ms"]) == fastest
    assert [True] * 5 in layouts
    assert {(4096, 64, 1), (4096, 1, 64)} <= {layout for layout in layouts if isinstance(layout, tuple)}


def test_a_peer_that_fails_is_left_out_and_named():
    def fail(*args, **kwargs):
        raise AttributeError("'NoneType' object has no attribute 'stride'")

    (peer,) = peers.PEERS["selective_scan"]
    shape, *_ = shapes.shapes_of("selective_scan", quick=True)
    measured = ops._measure(shape, CPU, ["torch"], [(peer, fail)], timing.Limits(1e10, None), True, ())
    note, *rows = measured
    text = "mamba-ssm fails: AttributeError: 'NoneType' object has no attribute 'stride'"
    assert note == tables.Note(f"{shape}: {text}")
    assert [row["backend"] for row in rows] == ["torch", "torch"]  # type: ignore[index]


@pytest.mark.parametrize("side", ["ophis", "accelerated"])
def test_language_models_take_turns(monkeypatch, capsys, side: str):
    """Everything but the measuring: a model of 130M is not built here."""
    turns = []

    class Worker:
        def __init__(self, side: str, name: str, work: str, length: int):
            self.job = (side, name, work, length)

        def measure(self) -> float:
            turns.append(self.job[0])
            return 0.5 if self.job[0] == "transformers" else 0.125

        def close(self) -> float:
            return 100.0

    monkeypatch.setattr(language_models, "Worker", Worker)
    options = ["--accelerated"] if side == "accelerated" else []
    assert main(["bench", "--work", "training step", *options]) == 0
    assert turns == [side, "transformers"] * 8  # one to warm up and three to count, of two models
    name = "accelerated_transformers_cpu.csv" if side == "accelerated" else "language_models_cpu.csv"
    rows = table(name)
    assert [row["length"] for row in rows] == ["128" if side == "accelerated" else "512", "512"]
    for row in rows:
        assert (row[f"{side}_s"], row["transformers_s"], row["times_faster"]) == ("0.1250", "0.5000", "4.00")
        assert (row[f"{side}_spread"], row[f"{side}_peak_mib"]) == ("0.1250-0.1250 of 3", "100")
        assert row["torch"] == torch.__version__
    assert f"written to {name}" in capsys.readouterr().out


def test_some_shapes_alone_keep_the_rest_of_the_table(capsys):
    def measure(*options: str) -> list[dict[str, str]]:
        arguments = ["causal_conv", "--quick", "--device", "cpu", "--backend", "torch"]
        assert main(["bench", *arguments, *options]) == 0
        return table("causal_conv_cpu.csv")

    first = measure()
    cases = [row["case"] for row in first]
    assert set(cases) == {"dense", "slice of 2 d"}
    again = measure("--only", "dense")
    assert [row["case"] for row in again] == cases
    assert [row for row in again if row["case"] != "dense"] == [row for row in first if row["case"] != "dense"]
    assert [row for row in again if row["case"] == "dense"] != [row for row in first if row["case"] == "dense"]
    assert main(["bench", "causal_conv", "--quick", "--device", "cpu", "--only", "no such shape"]) == 2
    message = capsys.readouterr().err
    assert "--only is 'no such shape', and no shape's name has that; there are\n  2 x 64 x 32, w 4, dense\n" in message
    Path("causal_conv_cpu.csv").write_text("op,batch\ncausal_conv,2\n")
    assert main(["bench", "causal_conv", "--quick", "--device", "cpu", "--backend", "torch", "--only", "dense"]) != 0
    assert "has other columns than this version writes" in capsys.readouterr().err
    assert Path("causal_conv_cpu.csv").read_text() == "op,batch\ncausal_conv,2\n"


def test_a_run_that_is_cut_off_loses_nothing_of_what_it_did_not_reach():
    """A shape's forward rows come first; those of its backward pass stay until they are measured anew."""

    def row(length: int, direction: str, date: str) -> dict[str, Any]:
        return {**dict.fromkeys(tables.KEYS, ""), "length": length, "direction": direction, "date": date}

    table = Path("ssd_cuda.csv")
    there = [row(length, direction, "old") for length in (64, 128) for direction in (shapes.FORWARD, shapes.TRAINING)]
    write_csv(table, there)
    found = tables.with_others([row(64, shapes.FORWARD, "new"), row(256, shapes.FORWARD, "new")], table)
    assert [(str(r["length"]), r["direction"], r["date"]) for r in found] == [
        *(("64", shapes.FORWARD, "new"), ("64", shapes.TRAINING, "old")),
        *(("128", shapes.FORWARD, "old"), ("128", shapes.TRAINING, "old"), ("256", shapes.FORWARD, "new")),
    ]


def test_plots_come_from_the_table_alone():
    Path("empty.csv").write_text("op,batch\n")
    assert plots.draw(Path("empty.csv")) == []
    common = dict(op="x", case="c", d=8, n="", w="", dtype="float32", ms_p20=1, ms_p50=2, ms_p80=3,
                  floor_ms=1, peak_mib="", machine="m", torch="2", date="d")  # fmt: skip
    rows = [
        {**common, "batch": 1, "length": length, "direction": direction, "backend": backend, "graph_ms": graph}
        for length, graph in ((8, 1.5), (16, 1.9), (32, ""))
        for direction in plots.DIRECTIONS
        for backend in ("cuda", "torch", "mamba-ssm", "something new", "and another", "and one more")
    ]
    with open("made_up.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    drawn = plots.draw(Path("made_up.csv"))
    assert [path.name for path in drawn] == ["made_up.png", "made_up_length.png"]
    assert all(png(str(path)) for path in drawn)


def test_a_plot_over_the_state_size():
    """And attention on a GPU is beside ssd without being compared with it, as it computes other numbers."""
    assert main(["bench", "ssd", "--quick", "--device", "cpu", "--backend", "torch"]) == 0
    assert all(png(f"ssd_cpu{which}.png") for which in ("", "_length", "_state"))
    rows = table("ssd_cpu.csv")
    assert {row["d"] for row in rows} == {"32"}
    assert all(int(row["flops"]) > 0 for row in rows)


def test_peers_of_ssd_get_the_same_numbers(monkeypatch):
    """This library's scan, and stand-ins with the official functions' signatures. Attention has the same width."""

    def combined(x, dt, A, B, C, chunk_size, D=None, dt_bias=None, dt_softplus=False):
        return OPS["ssd"](x, dt, A, B, C, D=D, dt_bias=dt_bias, dt_softplus=dt_softplus, backend="reference")[0]

    def update(state, x, dt, A, B, C, D, dt_bias):
        assert (dt.stride(-1), A.stride()[1:], dt_bias.stride(-1)) == (0, (0, 0), 0)
        assert not torch.cat([D, dt_bias]).any()
        return OPS["ssd_step"](x, dt[..., 0], A[:, 0, 0], B, C, state, backend="reference")

    for name, function in (("ssd_combined", combined), ("selective_state_update", update)):
        module = types.ModuleType(f"mamba_ssm.ops.triton.{name}")
        setattr(module, {"ssd_combined": "mamba_chunk_scan_combined"}.get(name, name), function)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    register(monkeypatch, "ssd_step", "right", OPS["ssd_step"].reference)
    for op, backend in (("ssd", "torch"), ("ssd_step", "right")):
        shape, *_ = shapes.shapes_of(op, quick=True)
        found, missing = peers.peers_of(op)
        assert not missing
        on_cpu = [(peer, function) for peer, function in found if peer.same_work]
        measured = list(ops._measure(shape, CPU, [backend], on_cpu, timing.Limits(1e10, None), True, ()))
        assert not [item for item in measured if isinstance(item, tables.Note)]
        assert {row["backend"] for row in measured} == {backend, *(peer.name for peer, _ in on_cpu)}  # type: ignore[index]
    attention = next(peer for peer in peers.PEERS["ssd"] if not peer.same_work and "64" in peer.name)
    given = []
    call, inputs = attention.prepare(lambda *qkv, is_causal: given.extend(qkv), {"x": torch.zeros(2, 16, 4, 32)})
    assert {tuple(t.shape) for t in inputs.values()} == {(2, 2, 16, 64)}
    call(**inputs)
    assert given == list(inputs.values())
