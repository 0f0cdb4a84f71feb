"""Settings classes: strict, frozen pydantic dataclasses, in modules that are found by a mark.

    @dataclass(frozen=True, kw_only=True, config=STRICT)   # from pydantic.dataclasses
    class HubSource: ...

    KIND = HubSource                                        # ends pipeline/sources/hub.py

The fields are the YAML keys. A room's folder is its list of kinds, specs and the like: a new one is
a new file, named in no other place, and only the chosen one is imported: where a recipe's section
has `Annotated[WeightSource, OneOf("pipeline.sources")]`, `kind: hub` chooses the one above. Below
that: where `conf/` and `recipes/`, which come with this code, and the cache lie; JSON of others.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, GetCoreSchemaHandler, Strict, TypeAdapter, ValidationError
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

from pipeline.core.errors import CorruptError

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
    return dict(_find_modules(room, mark, module, tuple(importlib.import_module(room).__path__)))


@cache
def _find_modules(
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


@dataclass(frozen=True)
class OneOf:
    """A field whose `kind` is a module of the package `room`, or `module` in a package there."""

    room: str
    module: str = ""

    def load(self, kind: Any) -> type | None:
        """Import the class behind a kind; None if there is no such kind."""
        modules = marked_modules(self.room, KIND, self.module)
        if not isinstance(kind, str) or kind not in modules:
            return None
        found: type = read_mark(modules[kind])
        return found

    def __get_pydantic_core_schema__(
        self, protocol: type, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(partial(self._fill, protocol))

    def _fill(self, protocol: type, value: Any) -> Any:
        if not isinstance(value, Mapping):
            if isinstance(value, protocol):
                return value
            raise PydanticCustomError("section", "Input should be a section with a kind")
        cls = self.load(value.get("kind"))
        if cls is None:
            allowed = ", ".join(marked_modules(self.room, KIND, self.module))
            text = "Input should be one of {allowed}"
            wrong = PydanticCustomError("kind", text, {"allowed": allowed})
            detail = InitErrorDetails(type=wrong, loc=("kind",), input=value.get("kind"))
            raise ValidationError.from_exception_data(protocol.__name__, [detail])
        return fill_settings(cls, {key: item for key, item in value.items() if key != "kind"})


def fill_settings(cls: type, settings: Mapping[str, Any]) -> Any:
    """A settings class filled from plain YAML values: lists become tuples, texts become paths."""
    return TypeAdapter(cls).validate_json(json.dumps(settings))


_MAX_JSON_BYTES = 256 << 20  # ten times the largest index
_PACKAGE = Path(__file__).resolve().parent.parent


def cache_root() -> Path:
    """`$ENGINESMITH_CACHE`, else `~/.cache/enginesmith`."""
    configured = os.environ.get("ENGINESMITH_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "enginesmith"


def data_dir(name: Literal["conf", "recipes"]) -> Path:
    """The folder of that name beside `pipeline/` in a checkout, inside it in an installed wheel.

    A checkout has a pyproject.toml: `site-packages/conf` may be another package's.
    """
    checkout = _PACKAGE.parent
    if (checkout / "pyproject.toml").is_file() and (checkout / name).is_dir():
        return checkout / name
    return _PACKAGE / "_data" / name


def shipped(option: str) -> dict[str, Any]:
    """The keys of an option as it ships, such as `runner/vllm`, less its `kind` and `defaults`."""
    import yaml

    values = yaml.safe_load((data_dir("conf") / f"{option}.yaml").read_text(encoding="utf-8"))
    return {name: value for name, value in values.items() if name not in ("kind", "defaults")}


def read_json_object(path: Path) -> dict[str, Any]:
    """Parse a JSON object; a `CorruptError` for anything else."""
    try:
        if not path.is_file() or path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"wanted a file of at most {_MAX_JSON_BYTES:,} bytes")
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{path}: not JSON: {error}; fetch it again") from error
    if not isinstance(value, dict):
        raise CorruptError(f"{path}: a JSON {type(value).__name__}, wanted an object")
    return value
