"""The house: which room may use which, how long a function may be, and how large all of it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "pipeline"
ROOMS = (
    *("cli", "commands", "__main__", "new", "race", "accept", "rehearse", "build", "publishing"),
    *("identity", "config", "acceptance", "runners", "machine", "plan", "formats", "quant"),
    *("sources", "model", "run_log", "answer", "outcome", "registry", "core"),
)
"""The left may import the right, never the other way; `registry` imports `core` alone."""
MAX_LINES = 60
MAX_HOUSE_LINES = 30_000
"""Of `pipeline/`, and of `tests/`: who adds a capability looks first for what it makes needless."""


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    return module.split(".")[1]


TREES = {module_of(path): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def imported(nodes: Iterator[ast.AST]) -> set[str]:
    """Modules of ours that import statements name; a name in a package may be a module."""
    names = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{name.name}" for name in node.names]
            names += [name if name in TREES else node.module for name in inner]
    return {name for name in names if name in TREES and name != "pipeline"}


def test_no_circle_between_modules() -> None:
    left = {name: imported(ast.walk(tree)) - {name} for name, tree in TREES.items()}
    while free := [name for name, wanted in left.items() if not wanted & left.keys()]:
        for name in free:
            del left[name]
    assert not left, "each of these imports another one of them"


@pytest.mark.parametrize("module", sorted(TREES.keys() - {"pipeline"}))
def test_no_arrow_up(module: str) -> None:
    room = room_of(module)
    allowed = {"registry", "core"} if room == "registry" else set(ROOMS[ROOMS.index(room) :])
    assert {room_of(name) for name in imported(ast.walk(TREES[module]))} <= allowed


def test_no_function_is_too_long() -> None:
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, FUNCTIONS):
                lines = (node.end_lineno or 0) - node.lineno + 1
                assert lines <= MAX_LINES, f"{module}:{node.lineno}"


@pytest.mark.parametrize("folder", [PACKAGE, PACKAGE.with_name("tests")], ids=lambda one: one.name)
def test_the_house_is_no_larger_than_it_may_be(folder: Path) -> None:
    assert (
        sum(len(path.read_text().splitlines()) for path in folder.rglob("*.py")) <= MAX_HOUSE_LINES
    )
