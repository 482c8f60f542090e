"""Who may import whom, read from the syntax trees, and what an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ophis

ROOT = Path(ophis.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# part of the package -> the other parts it may see, and the packages from outside that it needs besides torch
ALLOWED = {
    "ops": (set(), set()),
    "layers": ({"ops"}, set()),
    "models": (
        {"ops", "layers", "files"},
        {"transformers", "safetensors", "huggingface_hub", "tokenizers", "gguf", "numpy"},
    ),
    "generation": ({"ops", "layers", "models"}, {"transformers", "tokenizers"}),
    "files": (set(), set()),
    "training": (
        {"ops", "layers", "models", "generation", "files"},
        {"transformers", "tokenizers", "accelerate", "rich"},
    ),
    "integrations": ({"ops"}, {"transformers"}),
    "evaluation": ({"ops", "layers", "models", "generation", "files"}, {"transformers", "lm_eval"}),
    "compat": ({"ops", "layers", "models", "files"}, {"transformers", "huggingface_hub"}),
    "testing": ({"ops"}, set()),
    "bench": ({"ops", "layers", "models", "integrations", "testing", "files"}, {"transformers", "matplotlib"}),
    "cli": (
        {"ops", "layers", "models", "generation", "training", "evaluation", "testing", "bench", "files"},
        {"transformers", "rich", "tqdm", "lm_eval"},
    ),
}
# Each of these folders is the only one that sees its compiler.
COMPILERS = {"triton": {"triton"}, "cuda": {"cuda"}}
STANDARD = set(sys.stdlib_module_names) | {"torch", "ophis", "__future__"}


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Every module that a file names in an import, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide who imports whom"
            if node.module == "ophis":
                found |= {f"ophis.{alias.name}" for alias in node.names}
            elif node.module:
                found.add(node.module)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path):
    part = part_of(path)
    if part in ("__init__", "__main__"):
        return
    inside, outside = ALLOWED[part]
    if part == "ops":
        outside = outside | COMPILERS.get(path.relative_to(ROOT).parts[1], set())
    for module in imports(path):
        first, _, rest = module.partition(".")
        if first == "ophis":
            target = rest.partition(".")[0]
            assert target in inside | {part, "__version__"}, f"{part} may not see {target}"
        else:
            assert first in STANDARD | outside, f"{part} may not import {first}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_short(path: Path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= (700 if {"triton", "cuda", "cpu"} & set(path.parts) else 500)


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import ophis", ["torch", "transformers"]),
        ("import ophis.cli; ophis.cli.parser()", ["torch", "transformers"]),
        ("import ophis.ops", ["transformers", "triton", "numba", "torch._dynamo"]),
        ("import ophis.layers", ["transformers", "triton", "numba", "torch._dynamo"]),
        ("import ophis.compat", ["torch", "transformers"]),
        ("import ophis.compat; ophis.compat.install()", ["transformers", "triton", "numba", "torch._dynamo"]),
    ],
)
def test_an_import_brings_nothing_else(statement: str, absent: list[str]):
    # torch itself may import what is installed; what counts is what comes on top of it. Its compiler takes two seconds.
    first = "import torch;" if "torch" not in absent else ""
    code = f"import sys; {first} before = set(sys.modules); {statement}; print(*(set(sys.modules) - before))"
    brought = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not set(absent) & set(brought)


def test_public_names_resolve_and_say_what_they_are():
    from ophis import layers, models, ops

    for module in (ophis, ops, layers, models):
        for name in module.__all__:
            thing = getattr(module, name)
            assert thing.__doc__ or name.isupper(), f"{module.__name__}.{name} has no docstring"
    with pytest.raises(AttributeError, match="no attribute 'Mamba'; it has LanguageModel"):
        ophis.Mamba  # noqa: B018
