"""The house: which room may use which, and how long a function may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "pipeline"
ROOMS = (
    *("cli", "commands", "__main__", "new", "race", "accept", "rehearse", "build", "publishing"),
    *("identity", "config", "acceptance", "runners", "machine", "plan", "formats", "quant"),
    *("sources", "model", "answer", "outcome", "registry", "core"),
)
"""The left may import the right, never the other way."""
ANSWER = ("pipeline.commands.answer", "pipeline.commands.screen")
"""How every entry tells people and programs: a room of its own below them."""
MAX_LINES = 60


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {module_of(path): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def imported(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Modules of ours that import statements name; a name in a package may be a module."""
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            inner = [f"{node.module}.{name.name}" for name in node.names]
            names = [name if name in TREES else node.module for name in inner]
        else:
            continue
        yield from (name for name in names if name in TREES)


def at_import_time(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes outside functions; those for type checkers count."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from at_import_time(node)


def room_of(module: str) -> str:
    return "answer" if module in ANSWER else module.split(".")[1]


def test_no_circle_between_modules() -> None:
    left = {name: set(imported(at_import_time(tree))) - {name} for name, tree in TREES.items()}
    while free := [name for name, wanted in left.items() if not wanted & left.keys()]:
        for name in free:
            del left[name]
    assert not left, "these modules import each other, or what does"


@pytest.mark.parametrize("room", ROOMS)
def test_no_arrow_up(room: str) -> None:
    above = ROOMS[: ROOMS.index(room)]
    allowed = {"registry": {"registry", "core"}}.get(room, set(ROOMS) - set(above))
    found = {
        f"{module} imports {name}"
        for module, tree in TREES.items()
        if module != "pipeline" and room_of(module) == room
        for name in imported(ast.walk(tree))
        if name != "pipeline" and room_of(name) not in allowed
    }
    assert not found


def test_every_room_has_a_place() -> None:
    assert {room_of(module) for module in TREES if module != "pipeline"} == set(ROOMS)


def test_no_function_is_too_long() -> None:
    lengths = {
        f"{module}.{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}
