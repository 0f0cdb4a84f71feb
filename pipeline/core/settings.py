"""Settings classes: strict, frozen pydantic dataclasses, in modules that are found by a mark.

    @dataclass(frozen=True, kw_only=True, config=STRICT)   # from pydantic.dataclasses
    class HubSource: ...

    KIND = HubSource                                        # ends pipeline/sources/hub.py

The fields are the YAML keys. A room's folder is its list of kinds, specs and the like: a new one is
a new file, named in no other place, and only the chosen one is imported.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Strict

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
"""Unknown keys and wrong types are faults: `"8"` is no 8. Protocols are checked by isinstance."""

_Item = TypeVar("_Item")

Listed = Annotated[tuple[_Item, ...], Strict(False)]
"""A YAML list, frozen into a tuple."""

PathField = Annotated[Path, Strict(False)]
"""A YAML string that names a file or folder."""

KIND = "KIND"
"""The mark of a module that can be chosen by its name."""


def marked_modules(room: str, mark: str, module: str = "") -> dict[str, str]:
    """Name -> full module name of those in the package `room` with a line `MARK = ...`.

    `module` has that line where an entry is a package itself.
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


def read_mark(module: str, mark: str = KIND) -> Any:
    """What the line assigns; imports the module."""
    return getattr(importlib.import_module(module), mark)
