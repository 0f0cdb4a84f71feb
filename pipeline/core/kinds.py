"""A section of a recipe whose `kind` names the module that its settings class stands in.

KIND = HubSource                                              # ends pipeline/sources/hub.py
source: Annotated[WeightSource, OneOf("pipeline.sources")]    # `kind: hub` chooses it
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic import GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

from pipeline.core.settings import KIND, marked_modules, read_mark


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
        return core_schema.no_info_plain_validator_function(partial(self._validated, protocol))

    def _validated(self, protocol: type, value: Any) -> Any:
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
        return validated(cls, {key: item for key, item in value.items() if key != "kind"})


def validated(cls: type, settings: Mapping[str, Any]) -> Any:
    """A settings class filled from plain YAML values: lists become tuples, texts become paths."""
    return TypeAdapter(cls).validate_json(json.dumps(settings))
