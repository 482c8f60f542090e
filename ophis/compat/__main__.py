"""Run a script, or a module with -m, as Python does, with Ophis under the names mamba_ssm and causal_conv1d."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from pathlib import Path

from ophis.compat.installation import PACKAGES, install


def main(argv: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m ophis.compat",
        usage="python -m ophis.compat [-h] [--force] (SCRIPT | -m MODULE) [ARGUMENT ...]",
        description=__doc__,
    )
    parser.add_argument("--force", action="store_true", help="also where the real packages are installed")
    parser.add_argument("-m", dest="module", action="store_true", help="what follows is the name of a module")
    parser.add_argument("target", metavar="SCRIPT", help="the script, or the module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own")
    given = parser.parse_args(arguments)
    if not given.module and not Path(given.target).exists():
        parser.error(f"no script {given.target}")
    ours = install(force=given.force)
    left = [package for package in PACKAGES if package not in ours]
    if left:
        verb = "is" if len(left) == 1 else "are"
        print(
            f"ophis.compat: {' and '.join(left)} {verb} installed here and used; --force puts Ophis there",
            file=sys.stderr,
        )
    sys.argv = [given.target, *given.arguments]
    if not getattr(sys.flags, "safe_path", False):  # from Python 3.11 on
        # Python's own first entry of sys.path: the script's folder, the working directory for a module.
        sys.path[0] = os.getcwd() if given.module else str(Path(given.target).resolve().parent)
    if given.module:
        runpy.run_module(given.target, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(given.target, run_name="__main__")


if __name__ == "__main__":
    main()
