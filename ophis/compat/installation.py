"""Putting the modules below under the names `mamba_ssm` and `causal_conv1d`, and taking them away again."""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.util
import pkgutil
import sys
from collections.abc import Iterator
from types import ModuleType

PACKAGES = ("mamba_ssm", "causal_conv1d")
HERE = __package__ or "ophis.compat"

# package -> the modules that had its names before
_replaced: dict[str, dict[str, ModuleType]] = {}


def install(*, force: bool = False) -> tuple[str, ...]:
    """From here on `import mamba_ssm` and `import causal_conv1d` find Ophis.

    A package that is installed for real is left alone unless `force`. What a module imported before stays what it was.

    Returns:
        The packages that are Ophis's now.
    """
    for package in PACKAGES:
        if package not in _replaced and (force or not _is_installed(package)):
            ours = _modules(package)
            _replaced[package] = {name: sys.modules.pop(name) for name in _names_within(package)}
            sys.modules.update(ours)
    if _replaced and _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    return tuple(package for package in PACKAGES if package in _replaced)


def uninstall() -> None:
    """Undoes `install`: the names mean again what they meant before it, if anything."""
    _uninstall(tuple(_replaced))


@contextlib.contextmanager
def installed(*, force: bool = False) -> Iterator[tuple[str, ...]]:
    """`install` within a `with` statement; at its end, what it added is taken away."""
    before = tuple(_replaced)
    try:
        yield install(force=force)
    finally:
        _uninstall(tuple(package for package in _replaced if package not in before))


def _is_installed(package: str) -> bool:
    if package in sys.modules:
        return True
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # a folder of that name without __init__.py is no package


def _uninstall(packages: tuple[str, ...]) -> None:
    for package in packages:
        for name in _names_within(package):
            del sys.modules[name]
        sys.modules.update(_replaced.pop(package))
    if not _replaced and _finder in sys.meta_path:
        sys.meta_path.remove(_finder)


def _names_within(package: str) -> list[str]:
    return [name for name in sys.modules if name == package or name.startswith(f"{package}.")]


def _modules(package: str) -> dict[str, ModuleType]:
    """The original's module names, and the modules here that stand for them."""
    root = importlib.import_module(f"{HERE}.{package}")
    found = {package: root}
    for info in pkgutil.walk_packages(root.__path__, f"{root.__name__}."):
        module = importlib.import_module(info.name)
        if not info.ispkg:
            module.__path__ = []  # as a package has it: Python then asks `_Finder` for a name it does not find
        found[info.name.removeprefix(f"{HERE}.")] = module
    return found


class _Finder(importlib.abc.MetaPathFinder):
    """Says of whatever else is imported from the packages that it is not here.

    All that is here is in sys.modules, so only what is missing is looked for: a module, or, under the name that it has
    in this package, whatever `from ... import` does not find in one.
    """

    def find_spec(self, fullname, path=None, target=None):
        name = fullname.removeprefix(f"{HERE}.")
        package, _, rest = name.partition(".")
        if rest and package in _replaced:
            raise ImportError(
                f"{name} is not among what Ophis offers under the names of {package} (ophis.compat stands in its place "
                "here; docs/compat.md lists what there is)",
                name=fullname,
            )


_finder = _Finder()
