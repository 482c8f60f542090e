"""The switch: what `accelerate_transformers` replaces, that it can be undone, and what it leaves alone and says so."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import ophis
from mamba_family import FAMILY, NEWEST, VERSION, build, error, left_alone, plainly, tokens
from ophis.integrations.transformers import accelerate_transformers, functions
from ophis.integrations.transformers import acceleration as acceleration_module
from ophis.integrations.transformers.families import FAMILIES, MAMBA, MAMBA2
from ophis.integrations.transformers.fingerprint import UnfamiliarError, fingerprint
from ophis.integrations.transformers.keywords import passing_on

INSTALLED = [family for family in FAMILIES if importlib.util.find_spec(f"transformers.models.{family.name}")]
MODULES = {family.name: importlib.import_module(family.module) for family in INSTALLED}
MAMBA_MODULE = MODULES["mamba"]
all_known = pytest.mark.skipif(
    VERSION > NEWEST and bool(left_alone()), reason=f"transformers is newer than the call: {left_alone()}"
)


def what_is_there() -> dict[str, Any]:
    """Every function and every method of every class in the modules."""
    found = {}
    for name, module in MODULES.items():
        for key, value in vars(module).items():
            if inspect.isclass(value) and value.__module__ == module.__name__:
                found |= {f"{name}.{key}.{method}": f for method, f in vars(value).items() if inspect.isfunction(f)}
            elif callable(value):
                found[f"{name}.{key}"] = value
    return found


@pytest.fixture(autouse=True)
def nothing_stays():
    before = what_is_there()
    yield
    assert what_is_there() == before


def changes(before: dict[str, Any]) -> set[str]:
    return {key for key, value in what_is_there().items() if value is not before[key]}


@all_known
def test_what_is_replaced_and_put_back():
    before = what_is_there()
    acceleration = ophis.accelerate_transformers()
    assert acceleration.version == transformers.__version__
    expected = set()
    for model, replaced, methods, left in acceleration.models:
        assert not left
        assert set(functions.__dict__) >= set(replaced)
        expected |= {f"{model}.{name}" for name in (*replaced, *methods)}
    assert changes(before) == expected
    for family in INSTALLED:  # all that there are to be replaced
        assert f"{family.name}.{family.mixer}.forward" in expected
        assert {f"{family.name}.{f}" for f in family.kind.functions if hasattr(MODULES[family.name], f)} <= expected
    acceleration.undo()
    assert not changes(before)
    acceleration.undo()  # a second time does nothing
    assert not changes(before)


@all_known
def test_the_report_is_readable():
    with accelerate_transformers() as acceleration:
        first, *lines = str(acceleration).splitlines()
        assert first == f"transformers {transformers.__version__} on ophis.ops:"
        assert (
            lines[0]
            == "  mamba             5 functions; forward of MambaMixer, MambaModel, MambaForCausalLM, MambaBlock"
        )
        assert [line.split()[0] for line in lines] == [family.name for family in FAMILIES]
        assert repr(acceleration) == f"<Acceleration of transformers {transformers.__version__}, active>"
    assert str(acceleration).startswith(f"transformers {transformers.__version__} on ophis.ops, undone:\n")
    assert repr(acceleration) == f"<Acceleration of transformers {transformers.__version__}, undone>"


def test_calls_may_be_nested():
    before = what_is_there()
    with accelerate_transformers() as outer:
        replaced = changes(before)
        with pytest.raises(KeyError), accelerate_transformers():
            raise KeyError("within")
        assert changes(before) == replaced
        inner = accelerate_transformers()
    assert changes(before) == replaced
    inner.undo()
    assert not changes(before)
    with pytest.raises(RuntimeError, match="^this acceleration was undone; call ophis.accelerate_transformers"), outer:
        pass


def test_models_built_before_and_after():
    ids = tokens(1, 5)
    early = build("mamba2")
    expected = plainly(early, ids)
    with accelerate_transformers():
        late = build("mamba2")
        for model in (early, late):
            y = plainly(model, ids)
            assert error(y, expected) < 1e-5
            assert not torch.equal(y, expected)  # rounded differently
    for model in (early, late):
        assert torch.equal(plainly(model, ids), expected)


def test_models_imported_later():
    code = """
import sys, ophis
ophis.accelerate_transformers()
from transformers import BambaForCausalLM
print(sys.modules[BambaForCausalLM.__module__].mamba2_chunk_scan.__module__)
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[-1] == "ophis.integrations.transformers.functions"


# What is not as expected


@pytest.mark.parametrize("version", ["5.14.1", "4.57.6", "5.9.0.dev0"])
def test_an_older_version_is_refused(monkeypatch, version: str):
    monkeypatch.setattr("transformers.__version__", version)
    with pytest.raises(RuntimeError, match=f"needs transformers 5.15 or newer, .*; found {version}$"):
        accelerate_transformers()


def test_a_function_that_takes_something_else_leaves_its_model_alone(monkeypatch):
    def mamba_selective_scan(hidden_states, dt, A, B, C, initial_states=None):
        raise AssertionError

    monkeypatch.setattr(MAMBA_MODULE, "mamba_selective_scan", mamba_selective_scan)
    before = what_is_there()
    with accelerate_transformers() as acceleration:
        assert not any(key.startswith("mamba.") for key in changes(before))
        assert any(key.startswith("falcon_mamba.") for key in changes(before))
        mamba, *_ = acceleration.models
        assert mamba[:3] == ("mamba", (), ())
        assert mamba.left[0].startswith(
            "mamba_selective_scan takes (hidden_states, dt, A, B, C, initial_states=None), "
            "expected (hidden_states, dt, A, B, C, D=None, z=None, delta_bias=None, "
        )
        assert f"  mamba             left alone\n                    ! {mamba.left[0]}\n" in str(acceleration)


def test_nothing_as_expected_is_an_error(monkeypatch):
    for module in MODULES.values():
        monkeypatch.setattr(module, "causal_conv1d_fn", lambda x: x)
    with pytest.raises(RuntimeError, match=r"(?s)^nothing in transformers .* is as expected:\n  mamba  .*left alone\n"):
        accelerate_transformers()


def test_a_model_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.models.bamba.modeling_bamba", None)
    with accelerate_transformers() as acceleration:
        (bamba,) = (outcome for outcome in acceleration.models if outcome.model == "bamba")
        assert not bamba.functions
        assert bamba.left[0].startswith("transformers.models.bamba.modeling_bamba cannot be imported: ")


@all_known
@pytest.mark.parametrize("name", ["mamba", "zamba", "bamba"])
def test_a_mixer_that_changed_is_left_alone(monkeypatch, name: str):
    (family,) = (f for f in FAMILIES if f.name == name)
    changed = family._replace(kind=family.kind._replace(known=frozenset(("0", "1"))))
    monkeypatch.setattr(acceleration_module, "FAMILIES", [changed if f is family else f for f in FAMILIES])
    model, ids = build(name), tokens(1, 6)
    expected = plainly(model, ids)
    before = what_is_there()
    with accelerate_transformers() as acceleration:
        (outcome,) = (outcome for outcome in acceleration.models if outcome.model == name)
        replaced = {f.removeprefix(f"{name}.") for f in changes(before) if f.startswith(f"{name}.")}
        assert replaced == set(outcome.functions)
        assert len(outcome.functions) >= 4
        assert outcome.methods == ()
        assert re.fullmatch(
            rf"{family.mixer}\.forward has changed \(its fingerprint is \w{{8}}, expected 0 or 1\); "
            "continued prompts, padding and packing stay as transformers has them",
            *outcome.left,
        )
        assert error(plainly(model, ids), expected) < 1e-5
        mixer = getattr(MODULES[name], family.mixer)
        layer = next(module for module in model.modules() if isinstance(module, mixer))
        x, seq_idx = torch.randn(1, 6, 32), torch.tensor([[0, 0, 0, 1, 1, 1]])
        if family.kind.functions == MAMBA:  # whose own mixers do not tell the scan
            with pytest.raises(ValueError, match="^seq_idx: this model's mixer cannot keep packed sequences apart"):
                layer(x, seq_idx=seq_idx)
        else:
            separate = torch.cat([layer(x[:, :3]), layer(x[:, 3:])], 1)
            torch.testing.assert_close(layer(x, seq_idx=seq_idx), separate)


@all_known
def test_a_stack_that_changed_is_left_alone(monkeypatch):
    changed = FAMILIES[0]._replace(known=frozenset("0"))
    monkeypatch.setattr(acceleration_module, "FAMILIES", [changed, *FAMILIES[1:]])
    with accelerate_transformers() as acceleration:
        mamba, *_ = acceleration.models
        assert mamba.methods == ("MambaMixer.forward",)
        assert mamba.left[0].startswith("MambaModel.forward has changed (its fingerprint is ")
        assert mamba.left[0].endswith(", expected 0); packing stays as transformers has it")


@all_known
def test_a_method_that_does_not_call_what_it_should_is_left_alone(monkeypatch):
    changed = FAMILIES[0]._replace(way=(("MambaBlock", "self.mixture"),))
    monkeypatch.setattr(acceleration_module, "FAMILIES", [changed, *FAMILIES[1:]])
    with accelerate_transformers() as acceleration:
        mamba, *_ = acceleration.models
        assert mamba.methods == ("MambaMixer.forward",)
        assert mamba.left == (
            "MambaBlock.forward calls self.mixture 0 times, expected once; packing stays as transformers has it",
        )


@all_known
@pytest.mark.parametrize(("name", "methods"), [("MambaMixer", 0), ("MambaModel", 1), ("MambaBlock", 1)])
def test_what_others_replaced_before_is_left_alone(monkeypatch, name: str, methods: int):
    cls = getattr(MAMBA_MODULE, name)

    @functools.wraps(cls.forward)
    def forward(self, *args, **kwargs):
        return forward.__wrapped__(self, *args, **kwargs)

    monkeypatch.setattr(cls, "forward", forward)
    with accelerate_transformers() as acceleration:
        mamba, *_ = acceleration.models
        assert cls.forward is forward
        assert len(mamba.methods) == methods
        assert mamba.left[0].startswith(f"{name}.forward was replaced by {__name__}; ")


def test_without_sources_the_functions_are_left(monkeypatch):
    def missing(function):
        raise OSError("could not get source code")

    monkeypatch.setattr(inspect, "getsourcelines", missing)
    with accelerate_transformers() as acceleration:
        mamba, *_ = acceleration.models
        assert len(mamba.functions) == 5
        assert re.match(r"the source of .* is not installed; continued prompts", mamba.left[0])


def test_what_others_replaced_meanwhile_stays(monkeypatch):
    original = MAMBA_MODULE.mamba_selective_scan
    acceleration = accelerate_transformers()

    def theirs():
        raise AssertionError

    MAMBA_MODULE.mamba_selective_scan = theirs
    try:
        with pytest.warns(
            UserWarning, match="by others meanwhile, and left so: .*modeling_mamba.mamba_selective_scan$"
        ):
            acceleration.undo()
        assert MAMBA_MODULE.mamba_selective_scan is theirs
    finally:
        MAMBA_MODULE.mamba_selective_scan = original


def test_functions_that_kernels_made_modules_of(monkeypatch):
    """The package `kernels` makes each an instance of a module, whose forward has the signature."""
    original = MAMBA_MODULE.mamba_selective_scan
    if isinstance(original, torch.nn.Module):
        pytest.skip("kernels is installed: all tests here are of such modules")

    class Func(torch.nn.Module):
        def forward(self, *args, **kwargs):
            return original(*args, **kwargs)

    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    Func.forward.__signature__ = inspect.Signature([*parameters, *inspect.signature(original).parameters.values()])
    func = Func()
    monkeypatch.setattr(MAMBA_MODULE, "mamba_selective_scan", func)
    with accelerate_transformers() as acceleration:
        assert "mamba_selective_scan" in acceleration.models[0].functions
        assert MAMBA_MODULE.mamba_selective_scan is functions.mamba_selective_scan
    assert MAMBA_MODULE.mamba_selective_scan is func


# The tools


def test_fingerprints_are_of_what_runs():
    def f(x: int) -> int:
        """Says something."""
        return x + 1  # and why

    first = fingerprint(f)

    def f(x):
        return x + 1

    second = fingerprint(f)

    def f(x):
        return x - 1

    assert first == second != fingerprint(f)


class Example:
    def __init__(self, seen: list[dict[str, Any]]):
        self.seen = seen

    def inner(self, x: int, **kwargs: Any) -> int:
        self.seen.append(kwargs)
        if "fail" in kwargs:
            raise KeyError("asked for")
        return x

    def drops(self, x: int = 1, *, y: int = 2, **kwargs: Any) -> int:
        """What it says."""
        doubled = 2 * x
        return self.inner(doubled + y)

    def passes(self, x: int, **kwargs: Any) -> int:
        return self.inner(x, **kwargs)

    def twice(self, x: int, **kwargs: Any) -> int:
        return self.inner(self.inner(x))

    def takes_none(self, x: int) -> int:
        return self.inner(x)


def test_keywords_are_passed_on_and_nothing_else_changes():
    made = passing_on(Example.drops, "self.inner")
    example = Example([])
    assert made(example, 3, a=5) == Example.drops(example, 3, a=5) == 8
    assert example.seen == [{"a": 5}, {}]
    assert (made.__name__, made.__doc__, made.__module__) == ("drops", "What it says.", __name__)
    assert inspect.signature(made) == inspect.signature(Example.drops)
    assert passing_on(Example.passes, "self.inner") is Example.passes
    with pytest.raises(KeyError) as caught:
        made(example, 1, fail=True)
    lines = [frame.line for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert "return self.inner(doubled + y)" in lines  # tracebacks show the file's own line
    for method, message in ((Example.twice, "calls self.inner 2 times, expected once"),
                            (Example.takes_none, "takes no \\*\\*kwargs")):  # fmt: skip
        with pytest.raises(UnfamiliarError, match=message):
            passing_on(method, "self.inner")


DOCS = Path(__file__).parent.parent / "docs" / "transformers.md"


def test_the_page_runs_as_printed():
    namespace: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    try:
        for index, block in enumerate(blocks):
            exec(compile(block, f"transformers.md, block {index}", "exec"), namespace)
    finally:
        while acceleration_module._holders:
            acceleration_module._release()


def test_the_page_names_what_is_replaced():
    rows = re.findall(
        r"^\| (`.*`) \| (`.*`), and `forward` of the mixer \|$", DOCS.read_text(encoding="utf-8"), re.MULTILINE
    )
    printed = [[re.findall(r"`(\w+)`", cell) for cell in row] for row in rows]
    of = {kind: [f.name for f in FAMILIES if f.kind.functions == kind] for kind in (MAMBA, MAMBA2)}
    assert printed == [[models, list(kind)] for kind, models in of.items()]


def test_families_are_those_of_the_tests():
    assert [family.name for family in FAMILIES] == list(FAMILY)
