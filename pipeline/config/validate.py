"""One composed configuration -> one `Recipe`, or every fault in it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from omegaconf import DictConfig, ListConfig, Node, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException
from omegaconf.grammar_parser import parse
from pydantic import ValidationError

from pipeline.config.folders import closest, suggestion
from pipeline.config.recipe import Recipe
from pipeline.core.errors import Fault
from pipeline.core.kinds import OneOf, validated

Location = tuple[int | str, ...]


def validate(config: DictConfig) -> tuple[Mapping[str, Any], Recipe | None, list[Fault]]:
    """Resolve a configuration to plain dicts and lists, and check it whole."""
    broken: dict[str, str] = {}
    plain = _resolved(config, "", broken)
    faults = [Fault(path, message) for path, message in broken.items() if message]
    recipe = None
    try:
        recipe = validated(Recipe, plain)
    except ValidationError as error:
        found = _validation_faults(error, plain)
        faults += [fault for fault in found if not _follows_from(broken, fault)]
    return plain, None if faults else recipe, faults


def _follows_from(broken: Mapping[str, str], fault: Fault) -> bool:
    """Whether a fault says only that a broken value is not there."""
    return any(path == fault.path or path.startswith(f"{fault.path}.") for path in broken)


def _resolved(node: Any, path: str, broken: dict[str, str]) -> Any:
    """Plain dicts and lists, less what is missing or cannot be resolved.

    `broken` gets the path of every such value, with its fault or, where that is another's, "".
    """
    if not isinstance(node, DictConfig | ListConfig):
        return node
    keys: list[Any] = list(node) if isinstance(node, DictConfig) else list(range(len(node)))
    children = {}
    for key in keys:
        below = f"{path}.{key}" if path else str(key)
        try:
            raw = node._get_node(key)
            if isinstance(raw, Node) and _calls_resolver(raw._value()):
                broken[below] = (
                    "a recipe holds data only; ${NAME:...} is not resolved, write the value"
                )
            elif OmegaConf.is_missing(node, key):
                broken[below] = _required(below)
            else:
                children[key] = _resolved(node[key], below, broken)
        except InterpolationToMissingValueError:
            broken[below] = ""
        except OmegaConfBaseException as error:
            broken[below] = f"cannot be resolved: {str(error).splitlines()[0]}"
    return children if isinstance(node, DictConfig) else list(children.values())


def _required(path: str) -> str:
    return f"is required; set {path}=VALUE or put it in the recipe"


def _calls_resolver(raw: Any) -> bool:
    """Whether a value would run code: `${oc.env:HOME}` is one machine's, `${now:}` one second's."""
    if not (isinstance(raw, str) and "${" in raw):
        return False

    def calls(tree: Any) -> bool:
        inner = getattr(tree, "children", None) or ()
        return type(tree).__name__ == "InterpolationResolverContext" or any(map(calls, inner))

    return calls(parse(raw))


def _validation_faults(error: ValidationError, config: Mapping[str, Any]) -> list[Fault]:
    """One fault per config path; the alternatives of a union are joined by "or"."""
    messages: dict[str, list[str]] = {}
    for detail in error.errors(include_url=False):
        location = _config_location(detail["loc"], config)
        path = ".".join(map(str, location))
        messages.setdefault(path, []).append(_message(detail, location, config))
    return [Fault(path, " or ".join(dict.fromkeys(found))) for path, found in messages.items()]


def _config_location(loc: Location, config: Any) -> Location:
    """The part of pydantic's location that is in the config; it adds names of union members."""
    location: list[int | str] = []
    node = config
    for part in loc:
        inside = isinstance(node, Mapping | list)
        try:
            node = node[part] if inside else node
        except (KeyError, IndexError, TypeError):
            inside = part == loc[-1]  # a key that is missing
        if inside:
            location.append(part)
    return tuple(location)


def _message(detail: Mapping[str, Any], location: Location, config: Mapping[str, Any]) -> str:
    """What was got, and what is allowed, in pydantic's words."""
    kind, path = detail["type"], ".".join(map(str, location))
    if kind in {"value_error", "assertion_error"}:
        return str(detail["ctx"]["error"])
    if kind in {"unexpected_keyword_argument", "extra_forbidden"}:
        return f"there is no such key; {_key_suggestion(location, config)}"
    if kind in {"missing", "missing_keyword_only_argument"}:
        return _required(path)
    wanted = re.sub(r"^\w+ should\b", "must", detail["msg"])
    choose = f"; choose one: {path}=OPTION" if kind == "section" else ""
    return f"got {_shown(detail['input'])}, {wanted}{choose}"


def _key_suggestion(location: Location, config: Mapping[str, Any]) -> str:
    """The keys that are allowed beside a misspelt one; else the same key in another section."""
    *section, key = location
    allowed = _fields_at(section, config)
    if closest(str(key), allowed) is None:
        elsewhere = [path for path in _paths(config) if path.rpartition(".")[2] == key]
        elsewhere = [path for path in elsewhere if path != ".".join(map(str, location))]
        if elsewhere:
            return f"did you mean {' or '.join(elsewhere)}?"
    prefix = "".join(f"{part}." for part in section)
    return suggestion(f"{prefix}{key}", [f"{prefix}{name}" for name in allowed])


def _fields_at(section: Sequence[int | str], config: Any) -> tuple[str, ...]:
    """The keys that a section of a recipe may have; empty if there is no such section."""
    cls: Any = Recipe
    for key in section:
        if isinstance(key, int):
            config = config[key]
            continue  # `cls` is that of the items
        field = getattr(cls, "__pydantic_fields__", {}).get(key)
        config = config.get(key) if isinstance(config, Mapping) else None
        if field is None or config is None:
            return ()
        kinds = [mark for mark in field.metadata if isinstance(mark, OneOf)]
        if kinds:
            cls = kinds[0].load(config.get("kind")) if isinstance(config, Mapping) else None
        else:
            cls = _settings_class(field.annotation)
    return tuple(getattr(cls, "__pydantic_fields__", ()))


def _settings_class(annotation: Any) -> Any:
    """The settings class in an annotation such as `tuple[Workload, ...]` or `Chat | None`."""
    inner = [_settings_class(argument) for argument in get_args(annotation)]
    found = [cls for cls in (annotation, *inner) if hasattr(cls, "__pydantic_fields__")]
    return found[0] if found else None


def _paths(node: Any, path: str = "") -> list[str]:
    """Every dotted key path below a node."""
    if not isinstance(node, Mapping):
        return []
    found = []
    for name, child in node.items():
        below = f"{path}.{name}" if path else str(name)
        found += [below, *_paths(child, below)]
    return found


def _shown(value: Any) -> str:
    """A value as a recipe spells it, cut when it is long."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
