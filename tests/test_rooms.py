"""The rules of the rooms: imports point one way, families keep apart, nothing below prints."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import leadline

HOME = Path(leadline.__file__).parent
FAMILIES = {"attacks", "datasets", "judges", "models"}
# From the top down: a room imports only what stands in a lower row, or its own row's room.
ROWS: list[set[str]] = [
    {"cli"},
    {"align"},
    {"catalogue", "depth", "report"},
    {"judge_check", "rejudge"},
    {"analysis", "engine"},
    {"assist"},
    {"plan", "store"},
    {"study"},
    FAMILIES,
    {"registry", "organism"},
    {"records"},
    {"__init__"},
]
LEVEL = {room: level for level, row in enumerate(ROWS) for room in row}


def modules() -> Iterator[tuple[str, Path, ast.Module]]:
    for path in sorted(HOME.rglob("*.py")):
        room = path.relative_to(HOME).parts[0].removesuffix(".py")
        yield room, path, ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path, tree: ast.Module) -> Iterator[str]:
    """Rooms of ours that a file imports when it runs (type checking aside)."""
    package = ["leadline", *path.relative_to(HOME).parent.parts]
    checked = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in checked:
            continue
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            full = base + (node.module.split(".") if node.module else [])
            names = [full] if len(full) > 1 else [[*full, alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        else:
            continue
        for name in names:
            if name[0] == "leadline" and len(name) > 1:
                yield name[1]


def test_every_room_has_its_row():
    assert {room for room, *_ in modules()} <= set(LEVEL)


def test_imports_point_down():
    wrong = []
    for room, path, tree in modules():
        for other in imported(path, tree):
            if other == room or other == "__version__" or room == "__init__":
                continue
            if LEVEL[other] < LEVEL[room]:
                wrong.append(f"{path.relative_to(HOME)} imports {other}")
            if room in FAMILIES and other in FAMILIES:
                wrong.append(f"{path.relative_to(HOME)} imports its neighbour {other}")
    assert not wrong, wrong


def test_nothing_below_the_command_line_prints():
    prints = [
        f"{path.relative_to(HOME)}:{node.lineno}"
        for room, path, tree in modules()
        if room != "cli"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
    ]
    assert not prints, prints
