"""From a `config.json`, or the same keys in `recipes/shapes`, to a ModelSpec."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from pipeline.core.errors import Fault, RecipeError
from pipeline.core.json_files import read_json_object
from pipeline.model import families
from pipeline.model.config_keys import IRRELEVANT, REQUIRED, ConfigKeys
from pipeline.model.spec import ModelSpec

CONFIG_FILE = "config.json"


def model_types() -> tuple[str, ...]:
    """The families that we have, by their file names."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(families.__path__)))


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Read a config.

    Raises:
        RecipeError: All that is wrong or not understood, one fault a key.
    """
    spec, keys = _read(config)
    keys.raise_faults()
    return spec


def load_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a model folder.

    Raises:
        CorruptError: It is no JSON object.
    """
    return read_json_object(folder / CONFIG_FILE)


def spec_faults(spec: ModelSpec, config: Mapping[str, Any]) -> list[Fault]:
    """Where a fetched `config.json` differs from the spec that the recipe planned with."""
    found = read_spec(config)
    if found == spec:
        return []
    planned_keys, found_keys = _read(spec.config)[1].read, _read(config)[1].read
    return [
        Fault(
            f"shape.{key}",
            f"the recipe plans with {planned_keys.get(key)}, the fetched config.json says "
            f"{found_keys.get(key)}; correct recipes/shapes or choose the right source",
        )
        for key in planned_keys | found_keys
        if planned_keys.get(key) != found_keys.get(key)
    ]


def _read(config: Mapping[str, Any]) -> tuple[ModelSpec, ConfigKeys]:
    """The spec, which counts only if the keys have no faults.

    Raises:
        RecipeError: There is no such family, or too much is wrong to go on.
    """
    keys = ConfigKeys(config)
    known = model_types()
    model_type = str(keys.take("model_type", "")).replace("-", "_").replace(".", "_")
    if model_type not in known:
        named = f"is {config['model_type']!r}" if config.get("model_type") else "is missing"
        keys.fault("model_type", f"{named}; the model types that we read are {', '.join(known)}")
        keys.raise_faults()
    family = importlib.import_module(f"{families.__name__}.{model_type}")
    architectures = keys.take("architectures", [])
    if architectures != [family.ARCHITECTURE]:
        wanted = [family.ARCHITECTURE]
        keys.fault("architectures", f"is {architectures!r}; a {model_type} model has {wanted!r}")
        keys.raise_faults()
    keys.ignore(*IRRELEVANT)
    for key, value in REQUIRED.items():
        keys.require(key, value)
    spec: ModelSpec = family.read(keys)
    keys.check_all_known()
    return spec, keys


def _validated(value: Any) -> Any:
    """A recipe's section as a spec; pydantic gets every fault at its key."""
    if not isinstance(value, Mapping):
        return value
    try:
        spec, keys = _read(value)
        keys.raise_faults("")
    except RecipeError as error:
        raise ValidationError.from_exception_data(
            "shape",
            [
                InitErrorDetails(
                    type=PydanticCustomError("value_error", "{error}", {"error": fault.message}),
                    loc=tuple(fault.path.removeprefix("config.json: ").split(".")),
                    input=value,
                )
                for fault in error.faults
            ],
        ) from error
    return spec


Shape = Annotated[ModelSpec, BeforeValidator(_validated)]
"""A field of a recipe that holds the keys of a `config.json`."""
