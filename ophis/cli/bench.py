"""Measure this machine: operators and layers by name, or else the 130M language models on the CPU.

ophis bench selective_scan ssd    every backend that runs here, over the shapes of models
ophis bench mamba mamba2          whole layers, beside mamba-ssm's
ophis bench ssd --only "n 128"    some of the shapes
ophis bench                       the language models, beside transformers'
ophis bench --accelerated         transformers' models after ophis.accelerate_transformers(), beside before

Each row is printed as it comes and written to a CSV with the machine, the versions and the commit. An operator's
backend is checked before it is timed, and left out where it is wrong (the exit code is then 1). Beside it stand the
functions of mamba-ssm and causal-conv1d where they are installed, beside ssd also attention of the same width; and its
share of what the device could do: move the bytes, take the exponentials, multiply the matrices. The training step of
transformers' Mamba takes ten minutes; `--work` leaves it out.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "operators",
        nargs="*",
        metavar="OP",
        help="any of selective_scan, selective_scan_step, ssd, ssd_step, causal_conv, causal_conv_step, rms_norm, "
        "gated_rms_norm; of layers, mamba and mamba2",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where the tables go, and the operators' plots; the working directory if not given",
    )
    operators = parser.add_argument_group("operators and layers")
    operators.add_argument(
        "--backend", action="append", metavar="NAME", help="only this one of an operator's; all if not given"
    )
    operators.add_argument("--device", choices=("cuda", "cpu"), help="the GPU if not given and there is one")
    operators.add_argument(
        "--against", type=Path, metavar="FILE", help="a CSV of others' times to compare with, where shapes are the same"
    )
    operators.add_argument(
        "--only",
        metavar="TEXT",
        default="",
        help="only shapes with this in their names, such as '16 x 2048' or 'n 128'; a table keeps its other rows",
    )
    operators.add_argument("--quick", action="store_true", help="tiny shapes, in seconds, to see that it works")
    models = parser.add_argument_group("language models")
    models.add_argument("--model", action="append", metavar="NAME", help="mamba-130m or mamba2-130m; both if not given")
    models.add_argument(
        "--work",
        action="append",
        metavar="WORK",
        help="'forward', 'training step', 'first token' or 'decoding, per token'; all if not given",
    )
    models.add_argument(
        "--accelerated",
        action="store_true",
        help="transformers' own models with ophis.accelerate_transformers(), in place of ophis'",
    )


def run(arguments: argparse.Namespace) -> int:
    from ophis.cli.errors import UserError

    out = arguments.out or Path()
    if out.is_file() or out.suffix == ".csv":
        raise UserError(f"--out is {out}, expected a folder")
    of_operators = [
        f"--{name}" for name in ("backend", "device", "against", "only", "quick") if getattr(arguments, name)
    ]
    of_models = [f"--{name}" for name in ("model", "work", "accelerated") if getattr(arguments, name)]
    if arguments.operators and of_models:
        raise UserError(f"{of_models[0]} is for the language models, which are measured where no operator is named")
    if of_operators and not arguments.operators:
        raise UserError(f"{of_operators[0]} is for operators, and none is named")
    if arguments.operators:
        return _run_operators(arguments, out)
    return _run_language_models(arguments, out)


def _run_operators(arguments: argparse.Namespace, out: Path) -> int:
    import torch

    from ophis.bench import layers, ops, shapes, tables
    from ophis.bench.provenance import write_csv
    from ophis.cli.errors import UserError, user_errors
    from ophis.cli.info import default_device, version

    for name in arguments.operators:
        if name not in (*shapes.SHAPES, *layers.LAYERS):
            there = ", ".join((*shapes.SHAPES, *layers.LAYERS))
            raise UserError(f"no operator or layer {name!r} to measure; there are {there}")
    operators = [name for name in arguments.operators if name not in layers.LAYERS]
    if arguments.backend and len(operators) < len(arguments.operators):
        raise UserError("--backend is for operators: each of a layer's takes the fastest that it has")
    known = {backend: None for name in operators for backend in ops.backends(name)}
    for name in arguments.backend or ():
        if name not in known:
            raise UserError(f"no backend {name!r} of {', '.join(operators)}; there are {', '.join(known)}")

    def shapes_of(name: str) -> list[Any]:
        return (layers if name in layers.LAYERS else shapes).shapes_of(name, arguments.quick)

    named = [str(shape) for name in arguments.operators for shape in shapes_of(name)]
    if not any(arguments.only in shape for shape in named):
        raise UserError(
            f"--only is {arguments.only!r}, and no shape's name has that; there are\n  " + "\n  ".join(named)
        )
    device = torch.device(arguments.device or default_device().replace("mps", "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("this machine has no CUDA device")
    with user_errors():
        against = tables.read_against(arguments.against) if arguments.against else []
    wrong = False
    for name in dict.fromkeys(arguments.operators):
        print(f"{name} on {device}", flush=True)
        table = out / f"{name}_{device.type}.csv"
        rows: list[dict[str, Any]] = []
        options: dict[str, Any] = dict(quick=arguments.quick, only=arguments.only, against=against)
        if name in layers.LAYERS:
            items = layers.run(name, device, **options)
        else:
            items = ops.run(name, device, **options, backends=arguments.backend or ())
        for item in items:
            if isinstance(item, tables.Note):
                wrong = wrong or item.wrong
                print(f"  {item.text}", flush=True)
                continue
            rows.append(item)
            print(f"  {_line(item)}", flush=True)
            with user_errors():
                write_csv(table, tables.with_others(rows, table) if arguments.only else rows)
        if not rows:
            print("  nothing was measured")
        elif version("matplotlib") is None:
            print(f"written to {table}; for its plots: pip install 'ophis[bench]'")
        else:
            from ophis.bench.plots import draw

            print(f"written to {', '.join(map(str, [table, *draw(table)]))}")
    return 1 if wrong else 0


def _line(row: dict[str, Any]) -> str:
    sizes = " x ".join(str(row[key]) for key in ("batch", "length", "d"))
    sizes += "".join(f", {letter} {row[letter]}" for letter in ("n", "w") if row[letter])
    text = (
        f"{sizes:26} {row['case']:17} {row['dtype']:9} {row['direction']:19} {row['backend']:24} {row['ms_p50']:>9} ms"
    )
    if row["graph_ms"]:
        text += f" ({row['graph_ms']} in a graph)"
    text += f"   {float(row['share_of_floor']):4.0%} of the roofline"
    for ratio, name in (("times_faster", row["peer"]), ("against_times_faster", row["against"].partition(",")[0])):
        if row[ratio]:
            text += f"   {row[ratio]} times as fast as {name}"
    return text


def _run_language_models(arguments: argparse.Namespace, out: Path) -> int:
    from ophis.bench import language_models
    from ophis.bench.provenance import write_csv
    from ophis.cli.errors import UserError

    for given, known in ((arguments.model, language_models.MODELS), (arguments.work, tuple(language_models.WORKS))):
        for name in given or ():
            if name not in known:
                raise UserError(f"no {name!r} to measure; there are {', '.join(map(repr, known))}")
    models = tuple(arguments.model or language_models.MODELS)
    works = tuple(arguments.work or language_models.WORKS)
    side, table = "ophis", out / "language_models_cpu.csv"
    if arguments.accelerated:
        side, table = "accelerated", out / "accelerated_transformers_cpu.csv"
    print(f"{len(models) * len(works)} measurements on {language_models.THREADS} threads, float32, batch 1", flush=True)
    print(f"{'model':12} {'work':22} {side:>11} {'transformers':>13} {'times faster':>13}   peak MiB", flush=True)
    rows = []
    for row in language_models.run(models, works, side):
        rows.append(row)
        print(
            f"{row['model']:12} {row['work']:22} {row[f'{side}_s']:>10}s {row['transformers_s']:>12}s "
            f"{row['times_faster']:>13}   {row[f'{side}_peak_mib']} / {row['transformers_peak_mib']}",
            flush=True,
        )
        write_csv(table, rows)
    print(f"written to {table}")
    return 0
