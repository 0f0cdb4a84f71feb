"""What makes a kept result out of date: a stage's version, raised by hand, and its code.

    STAGE = Stage(name="quantize", version=1, code=("pipeline.quant", "pipeline.model.hf"))

The version is part of every key; the code is not, so that a comment or a moved class rebuilds
nothing. `stages.yaml` records a digest of the code at each version. While the code is another than
the recorded one, its digest is part of the key as well: an edit that was not looked at never
meets an old result. A contract test asks for the look: did the output change?
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

RECORD_FILE = Path(__file__).parent / "stages.yaml"
"""Stage -> version and digest of its code; one line each. `make record-stages` writes it."""

_DIGITS = 16
_NOT_CODE = frozenset({"ctx", "type_comment", "kind"})


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A step whose results are kept.

    Attributes:
        name: Of the folder in the cache, and of the line in `stages.yaml`.
        version: Raise it when the same inputs give another output.
        code: Modules that shape the output; a package counts with all below it.
    """

    name: str
    version: int
    code: tuple[str, ...]

    @property
    def identity(self) -> dict[str, Any]:
        """What a key says of the stage."""
        known = {"stage": self.name, "version": self.version}
        recorded = _records().get(self.name) == self.record
        return known if recorded else {**known, "code": self.digest}

    @property
    def digest(self) -> str:
        return code_digest(self.code)

    @property
    def record(self) -> dict[str, Any]:
        return {"version": self.version, "code": self.digest}


@cache
def _records() -> dict[str, Any]:
    import yaml

    records: dict[str, Any] = yaml.safe_load(RECORD_FILE.read_text(encoding="utf-8")) or {}
    return records


@cache
def code_digest(modules: tuple[str, ...]) -> str:
    """Digest of what modules do: their statements, wherever among them and in which order.

    Comments, docstrings, layout and import paths do not count. The same on Python 3.11 to 3.13.
    """
    statements = {text for module in modules for path in _files(module) for text in _parsed(path)}
    return hashlib.sha256("\n".join(sorted(statements)).encode()).hexdigest()[:_DIGITS]


def _files(module: str) -> list[Path]:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(module)
    origin = Path(spec.origin)
    return sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin]


@cache
def _parsed(path: Path) -> tuple[str, ...]:
    """Each top-level statement of a file in a canonical form."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return tuple(text for node in _statements(tree.body) if (text := _form(node)))


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Those that do something: no documentation, no imports for types, no `Stage` itself."""
    for node in body:
        match node:
            case (
                ast.Expr(value=ast.Constant(value=str()))
                | ast.If(test=ast.Name(id="TYPE_CHECKING"))
                | ast.Assign(value=ast.Call(func=ast.Name(id="Stage")))
            ):
                continue
        yield node


def _form(node: object) -> str:
    """A node as text: its kind and what it holds, less positions and what is empty."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return ",".join(f"{name.name} as {name.asname}" for name in node.names if name.asname)
    if isinstance(node, ast.JoinedStr):
        node = _pieces(node.values)
    if isinstance(node, ast.AST):
        fields = [
            f"{name}={text}"
            for name, value in ast.iter_fields(node)
            if name not in _NOT_CODE and (text := _form(value))
        ]
        return f"{type(node).__name__}({' '.join(fields)})"
    if isinstance(node, list):
        if node and isinstance(node[0], ast.stmt):
            node = list(_statements(node))
        items = [text for item in node if (text := _form(item))]
        return f"[{' '.join(items)}]" if items else ""
    return "" if node is None else repr(node)


def _pieces(values: list[ast.expr]) -> list[ast.expr]:
    """The parts of an f-string, neighbouring text as one: versions of Python cut it differently."""
    joined: list[ast.expr] = []
    for node in values:
        text = node.value if isinstance(node, ast.Constant) else None
        before = joined[-1].value if joined and isinstance(joined[-1], ast.Constant) else None
        if isinstance(text, str) and isinstance(before, str):
            joined[-1] = ast.Constant(value=before + text)
        elif text != "":
            joined.append(node)
    return joined
