"""Settings classes: strict, frozen pydantic dataclasses, chosen by the `kind` of a section.

    @dataclass(frozen=True, kw_only=True, config=STRICT)   # from pydantic.dataclasses
    class HubSource: ...

    KIND = HubSource                                        # ends pipeline/sources/hub.py
    source: Annotated[WeightSource, OneOf("pipeline.sources")]    # `kind: hub` chooses it

The fields are the YAML keys. A room's folder is its list of kinds, specs and the like: a new one is
a new file, named in no other place, and only the chosen one is imported.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, GetCoreSchemaHandler, Strict, TypeAdapter, ValidationError
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
"""Unknown keys and wrong types are faults: `"8"` is no 8. Protocols are checked by isinstance."""

_Item = TypeVar("_Item")

Listed = Annotated[tuple[_Item, ...], Strict(False)]
"""A YAML list, frozen into a tuple."""

PathField = Annotated[Path, Strict(False)]
"""A YAML string that names a file or folder."""

_MARK = "KIND"


def marked_modules(room: str, mark: str, module: str = "") -> dict[str, str]:
    """Name -> full module name of all in the package `room` that have a line `MARK = ...`.

    `module` is where an entry that is a package has that line; empty where none is.
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


def read_mark(module: str, mark: str = _MARK) -> Any:
    """What the line assigns; imports the module."""
    return getattr(importlib.import_module(module), mark)


@dataclass(frozen=True)
class OneOf:
    """Annotates a field whose section has a `kind`.

    Attributes:
        room: Package whose modules are the kinds.
        module: Where a kind is a package, its module with `KIND`; empty where none is.
    """

    room: str
    module: str = ""

    def load(self, kind: Any) -> type | None:
        """Import the class behind a kind; None if there is no such kind."""
        modules = marked_modules(self.room, _MARK, self.module)
        if not isinstance(kind, str) or kind not in modules:
            return None
        found: type = read_mark(modules[kind])
        return found

    def __get_pydantic_core_schema__(
        self, protocol: type, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """Let pydantic call `_validated` for the field."""
        return core_schema.no_info_plain_validator_function(partial(self._validated, protocol))

    def _validated(self, protocol: type, value: Any) -> Any:
        if not isinstance(value, Mapping):
            if isinstance(value, protocol):
                return value
            raise PydanticCustomError("section", "Input should be a section with a kind")
        cls = self.load(value.get("kind"))
        if cls is None:
            allowed = ", ".join(marked_modules(self.room, _MARK, self.module))
            text = "Input should be one of {allowed}"
            wrong = PydanticCustomError("kind", text, {"allowed": allowed})
            detail = InitErrorDetails(type=wrong, loc=("kind",), input=value.get("kind"))
            raise ValidationError.from_exception_data(protocol.__name__, [detail])
        return validated(cls, {key: item for key, item in value.items() if key != "kind"})


def validated(cls: type, settings: Mapping[str, Any]) -> Any:
    """A settings class filled from plain YAML values: lists become tuples, texts become paths.

    Raises:
        ValidationError: With all faults.
    """
    return TypeAdapter(cls).validate_json(json.dumps(settings))
