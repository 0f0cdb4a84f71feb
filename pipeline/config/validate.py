"""One composed configuration -> one `Recipe`, or every fault in it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from omegaconf import DictConfig, ListConfig, Node, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException
from omegaconf.grammar_parser import parse
from pydantic import ValidationError

from pipeline.config.closest import closest, suggestion
from pipeline.config.recipe import Recipe
from pipeline.core.errors import Fault
from pipeline.core.kinds import OneOf, validated

_WANTED = {
    "bool_type": "true or false",
    "dataclass_type": "a section",
    "dict_type": "a section",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "a number > {gt}",
    "greater_than_equal": "a number >= {ge}",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "kind": "one of {allowed}",
    "less_than": "a number < {lt}",
    "less_than_equal": "a number <= {le}",
    "list_type": "a list",
    "literal_error": "{expected}",
    "none_required": "null",
    "path_type": "a path",
    "section": "a section; choose one: {section}=OPTION",
    "string_pattern_mismatch": "text that matches {pattern}",
    "string_too_long": "at most {max_length} characters",
    "string_type": "text",
    "tuple_type": "a list",
}
"""pydantic's error types in the words of a recipe; the others keep pydantic's message."""


class _Broken:
    """Stands where a value should be that already has its fault."""


_BROKEN = _Broken()
Location = tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class Validated:
    """What a configuration stands for.

    Attributes:
        config: The configuration as plain dicts and lists, resolved; broken values are missing.
        recipe: None if there are faults.
        faults: All of them.
    """

    config: Mapping[str, Any]
    recipe: Recipe | None
    faults: tuple[Fault, ...]


def validate(config: DictConfig) -> Validated:
    """Resolve a configuration and check it whole, as `Recipe`."""
    broken: dict[str, str] = {}
    plain = _without_broken(_resolved(config, "", broken))
    faults = [Fault(path, message) for path, message in broken.items() if message]
    recipe = None
    try:
        recipe = validated(Recipe, plain)
    except ValidationError as error:
        found = _validation_faults(error, plain)
        faults += [fault for fault in found if not _follows_from(broken, fault)]
    return Validated(config=plain, recipe=None if faults else recipe, faults=tuple(faults))


def _follows_from(broken: Mapping[str, str], fault: Fault) -> bool:
    """Whether a fault says only that a broken value is not there."""
    return any(path == fault.path or path.startswith(f"{fault.path}.") for path in broken)


def _resolved(node: Any, path: str, broken: dict[str, str]) -> Any:
    """Plain dicts and lists; what is missing or cannot be resolved is `_BROKEN`.

    Args:
        node: Of the configuration.
        path: Its dotted path.
        broken: Gets the path of every broken value, with its fault or, where that is another's, "".
    """
    if isinstance(node, DictConfig):
        keys: list[Any] = list(node)
    elif isinstance(node, ListConfig):
        keys = list(range(len(node)))
    else:
        return node
    children = {
        key: _resolved_child(node, key, f"{path}.{key}" if path else str(key), broken)
        for key in keys
    }
    return children if isinstance(node, DictConfig) else list(children.values())


def _resolved_child(
    node: DictConfig | ListConfig, key: Any, path: str, broken: dict[str, str]
) -> Any:
    try:
        raw = node._get_node(key)
        if isinstance(raw, Node) and _calls_resolver(raw._value()):
            broken[path] = "a recipe holds data only; ${NAME:...} is not resolved, write the value"
            return _BROKEN
        if OmegaConf.is_missing(node, key):
            broken[path] = f"is required; set {path}=VALUE or put it in the recipe"
            return _BROKEN
        child = node[key]
    except InterpolationToMissingValueError:
        broken[path] = ""
        return _BROKEN
    except OmegaConfBaseException as error:
        broken[path] = f"cannot be resolved: {str(error).splitlines()[0]}"
        return _BROKEN
    return _resolved(child, path, broken)


def _calls_resolver(raw: Any) -> bool:
    """Whether a value would run code: `${oc.env:HOME}` is one machine's, `${now:}` one second's."""
    if not (isinstance(raw, str) and "${" in raw):
        return False

    def calls(tree: Any) -> bool:
        inner = getattr(tree, "children", None) or ()
        return type(tree).__name__ == "InterpolationResolverContext" or any(map(calls, inner))

    return calls(parse(raw))


def _without_broken(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _without_broken(child) for key, child in node.items() if child is not _BROKEN}
    if isinstance(node, list):
        return [_without_broken(child) for child in node if child is not _BROKEN]
    return node


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
    """What was got, and what is wanted."""
    kind, context, path = detail["type"], detail.get("ctx", {}), ".".join(map(str, location))
    if kind in {"value_error", "assertion_error"}:
        return str(context["error"])
    if kind in {"unexpected_keyword_argument", "extra_forbidden"}:
        return f"there is no such key; {_key_suggestion(location, config)}"
    if kind in {"missing", "missing_keyword_only_argument"}:
        return f"is required; set {path}=VALUE or put it in the recipe"
    got = _shown(detail["input"])
    if kind not in _WANTED:
        return f"got {got}: {detail['msg']}"
    message = f"got {got}, wanted {_WANTED[kind].format(**{'section': path, **context})}"
    options = {"kind": context.get("allowed", "").split(", ")}.get(kind) or re.findall(
        r"'([^']*)'", context.get("expected", "")
    )
    if isinstance(detail["input"], str) and (match := closest(detail["input"], options)):
        message += f"; did you mean {match}?"
    return message


def _key_suggestion(location: Location, config: Mapping[str, Any]) -> str:
    """The keys that are allowed beside a misspelt one; else the same key in another section."""
    *section, key = location
    allowed = fields_at(section, config)
    if closest(str(key), allowed) is None:
        elsewhere = [path for path in _paths(config) if path.rpartition(".")[2] == key]
        elsewhere = [path for path in elsewhere if path != ".".join(map(str, location))]
        if elsewhere:
            return f"did you mean {' or '.join(elsewhere)}?"
    prefix = "".join(f"{part}." for part in section)
    return suggestion(f"{prefix}{key}", [f"{prefix}{name}" for name in allowed])


def fields_at(section: Sequence[int | str], config: Any) -> tuple[str, ...]:
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
