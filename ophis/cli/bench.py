"""Measure this machine: the 130M language models beside transformers' on the CPU.

Each row is printed as it comes and written to a CSV with the machine, the versions and the commit. The training step
of transformers' Mamba takes ten minutes; `--work` leaves it out.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", action="append", metavar="NAME", help="mamba-130m or mamba2-130m; both if not given")
    parser.add_argument(
        "--work",
        action="append",
        metavar="WORK",
        help="'forward', 'training step', 'first token' or 'decoding, per token'; all if not given",
    )
    parser.add_argument("--out", type=Path, default=Path("language_models_cpu.csv"), metavar="FILE", help="the CSV")


def run(arguments: argparse.Namespace) -> int:
    from ophis.bench import language_models
    from ophis.bench.provenance import write_csv
    from ophis.cli.errors import UserError

    for given, known in ((arguments.model, language_models.MODELS), (arguments.work, tuple(language_models.WORKS))):
        for name in given or ():
            if name not in known:
                raise UserError(f"no {name!r} to measure; there are {', '.join(map(repr, known))}")
    models = tuple(arguments.model or language_models.MODELS)
    works = tuple(arguments.work or language_models.WORKS)
    print(f"{len(models) * len(works)} measurements on {language_models.THREADS} threads, float32, batch 1", flush=True)
    print(f"{'model':12} {'work':22} {'ophis':>9} {'transformers':>13} {'times faster':>13}   peak MiB", flush=True)
    rows = []
    for row in language_models.run(models, works):
        rows.append(row)
        print(
            f"{row['model']:12} {row['work']:22} {row['ophis_s']:>8}s {row['transformers_s']:>12}s "
            f"{row['times_faster']:>13}   {row['ophis_peak_mib']} / {row['transformers_peak_mib']}",
            flush=True,
        )
        write_csv(arguments.out, rows)
    print(f"written to {arguments.out}")
    return 0
