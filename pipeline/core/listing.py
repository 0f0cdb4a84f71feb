"""Finds the modules of a room that offer something, by a line such as `SPEC = `.

A room's folder is its list: a new precision or format is a new file there, named in no other place.
Modules are told apart by their text, so that only the wanted one is imported.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from functools import cache
from pathlib import Path
from typing import Any


def marked_modules(room: str, mark: str, module: str = "") -> dict[str, str]:
    """Name -> full module name of all that have the line `MARK = ...`, in the order of their names.

    Args:
        room: Package whose folder is listed.
        mark: Name that the line assigns, such as `SPEC`.
        module: Where an entry is a package, its module with that line; empty where none is.
    """
    return dict(_listed(room, mark, module, tuple(importlib.import_module(room).__path__)))


@cache
def _listed(
    room: str, mark: str, module: str, folders: tuple[str, ...]
) -> tuple[tuple[str, str], ...]:
    wanted = re.compile(rf"^{mark}\b.* = ", re.MULTILINE)
    found = {}
    for folder in map(Path, folders):
        for entry in pkgutil.iter_modules([str(folder)]):
            inner = f"{entry.name}/{module}" if entry.ispkg else entry.name
            path = folder / f"{inner}.py"
            if path.is_file() and wanted.search(path.read_text(encoding="utf-8")):
                found[entry.name] = f"{room}.{inner.replace('/', '.')}"
    return tuple(sorted(found.items()))


def read_mark(module: str, mark: str) -> Any:
    """What the line assigns; imports the module."""
    return getattr(importlib.import_module(module), mark)
