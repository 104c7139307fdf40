"""The layers: modules import only from lower layers, and only the command line prints."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import leadline

ROOT = Path(leadline.__file__).parent
PACKAGES = {"attacks", "datasets", "judges", "models"}
"""Packages of plug-ins, which do not import one another."""

# From the top down. A module imports only from layers below its own, or from its own package.
LAYERS = (
    *("cli", "align", "matters", "comparison", "depth", "report", "judging", "engine", "analysis"),
    *("assist", "plan", "catalogue", "judge_choice", "study", "store", "plugins", "families"),
    *("organism", "registry", "progress", "files", "text", "secret", "records", "version"),
)


def layer(module: str) -> int:
    """The index of a module's layer, 0 at the top; -1 for `leadline` itself."""
    parts = module.split(".")
    if len(parts) == 1:
        return -1
    name = "families" if parts[1] in PACKAGES else parts[1]
    return LAYERS.index(name)


@cache
def modules() -> dict[str, Path]:
    """The path of every module, by dotted name."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(module: str) -> Iterator[str]:
    """The Leadline modules that a module imports: at its top, in a function, for type checking."""
    path = modules()[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                inside = f"{name}.{alias.name}"
                yield from _ours(inside if inside in modules() else name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield from _ours(alias.name)


def _ours(name: str) -> Iterator[str]:
    if name.split(".")[0] == "leadline":
        assert name in modules(), f"{name} is imported and does not exist"
        yield name


@cache
def import_graph() -> dict[str, frozenset[str]]:
    return {module: frozenset(imports(module)) - {module} for module in modules()}


def test_the_import_graph_is_not_empty() -> None:
    """The other tests would pass on an empty graph."""
    assert "leadline.analysis.results" in import_graph()["leadline.engine"]
    assert "leadline.progress" in import_graph()["leadline.cli._app"], "type checking counts"
    assert sum(map(len, import_graph().values())) > 300


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_point_down(module: str) -> None:
    package = module.split(".")[:2]
    for other in import_graph()[module]:
        if other.split(".")[:2] != package or len(package) == 1:
            assert layer(other) > layer(module), f"{module} imports {other}: not a lower layer"


def test_there_are_no_import_cycles() -> None:
    """Also within a package: the import graph has a topological order. `leadline` and the
    `__init__` of a package count as modules."""
    waiting = {module: set(others) for module, others in import_graph().items()}
    while free := [module for module, others in waiting.items() if not others & waiting.keys()]:
        for module in free:
            del waiting[module]
    assert not waiting, f"import cycles among {sorted(waiting)}"


def test_no_private_module_of_another_package_is_imported() -> None:
    private = [
        f"{module} imports {other}"
        for module, others in import_graph().items()
        for other in others
        if other.rpartition(".")[2].startswith("_")
        and not f"{module}.".startswith(f"{other.rpartition('.')[0]}.")
    ]
    assert not private, private


def test_plugin_families_do_not_import_one_another() -> None:
    crossing = [
        f"{module} imports {other}"
        for module, others in import_graph().items()
        for other in others
        if {module.split(".")[1:2][0] if "." in module else "", other.split(".")[1]} <= PACKAGES
        and module.split(".")[1] != other.split(".")[1]
        if "." in other
    ]
    assert not crossing, crossing


def test_nothing_below_the_command_line_prints() -> None:
    prints = [
        f"{module}:{node.lineno}"
        for module, path in modules().items()
        if not module.startswith("leadline.cli")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
    ]
    assert not prints, prints
