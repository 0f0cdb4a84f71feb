"""One configuration -> one object, or every fault in it.

Each section with a `_target_` is built for itself, innermost first. A section that cannot be built
does not hide faults in the others: the one around it is still checked, without that field.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException
from pydantic import ValidationError

from pipeline.config.closest import closest, suggestion
from pipeline.core.errors import Fault

_WANTED = {
    "bool_type": "true or false",
    "dict_type": "a section",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "a number > {gt}",
    "greater_than_equal": "a number >= {ge}",
    "int_type": "a whole number",
    "less_than": "a number < {lt}",
    "less_than_equal": "a number <= {le}",
    "list_type": "a list",
    "literal_error": "{expected}",
    "none_required": "null",
    "path_type": "a path",
    "string_pattern_mismatch": "text that matches {pattern}",
    "string_type": "text",
    "tuple_type": "a list",
}
"""pydantic's error types in the words of a recipe; the others keep pydantic's message."""


class _Broken:
    """Stands where a value should be that already has its fault."""


_BROKEN = _Broken()


@dataclass(frozen=True, kw_only=True)
class Constructed:
    """What a configuration stands for.

    Attributes:
        config: The configuration as plain dicts and lists, resolved; broken values are missing.
        value: The object; None if there are faults.
        faults: All of them.
    """

    config: Mapping[str, Any]
    value: Any
    faults: tuple[Fault, ...]


def construct(config: DictConfig) -> Constructed:
    """Resolve a configuration and build its object; `_target_` of the root names the class."""
    faults: list[Fault] = []
    plain = _resolved(config, "", faults)
    value = _built(plain, "", faults)
    return Constructed(
        config=_without_broken(plain),
        value=None if faults else value,
        faults=tuple(faults),
    )


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _resolved(node: Any, path: str, faults: list[Fault]) -> Any:
    """Plain dicts and lists; a missing or unresolvable value becomes `_BROKEN` and a fault."""
    if isinstance(node, DictConfig):
        return {key: _resolved_child(node, key, _join(path, key), faults) for key in node}
    if isinstance(node, ListConfig):
        return [_resolved_child(node, i, _join(path, i), faults) for i in range(len(node))]
    return node


def _resolved_child(node: DictConfig | ListConfig, key: Any, path: str, faults: list[Fault]) -> Any:
    try:
        if OmegaConf.is_missing(node, key):
            faults.append(Fault(path, f"is required; set {path}=VALUE or put it in the recipe"))
            return _BROKEN
        child = node[key]
    except InterpolationToMissingValueError:
        return _BROKEN  # the value that it points to has the fault
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        faults.append(Fault(path, f"cannot be resolved: {reason}"))
        return _BROKEN
    return _resolved(child, path, faults)


def _without_broken(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _without_broken(child) for key, child in node.items() if child is not _BROKEN}
    if isinstance(node, list):
        return [_without_broken(child) for child in node if child is not _BROKEN]
    return node


def _built(node: Any, path: str, faults: list[Fault]) -> Any:
    """The object or plain value of a node; `_BROKEN` if anything in it has a fault."""
    if isinstance(node, list):
        items = [_built(child, _join(path, i), faults) for i, child in enumerate(node)]
        return _BROKEN if _BROKEN in items else items
    if not isinstance(node, dict):
        return node
    children = {
        key: _built(child, _join(path, key), faults)
        for key, child in node.items()
        if key != "_target_"
    }
    if "_target_" in node:
        return _object(node["_target_"], children, path, faults)
    if not path:
        message = "the recipe does not start from `build`; make `- build` the first of its defaults"
        faults.append(Fault("", message))
    return _BROKEN if _BROKEN in children.values() else children


def settings_class(target: Any) -> type:
    """The class that a `_target_` names.

    Only dataclasses: a recipe may come from anywhere, and names settings, not any callable of any
    package.

    Raises:
        ImportError: There is none.
    """
    module, _, name = str(target).rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ImportError(f"cannot load {target!r}: {error}") from error
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise ImportError(f"{target!r} is not a dataclass; name a class with settings")
    return found


def fields_of(cls: type) -> Mapping[str, inspect.Parameter]:
    """The keys that a section with this class may have."""
    return inspect.signature(cls).parameters


def _object(target: Any, children: Mapping[str, Any], path: str, faults: list[Fault]) -> Any:
    """Build one class from its fields, or add a fault for everything that it does not like."""
    try:
        cls = settings_class(target)
    except ImportError as error:
        faults.append(Fault(_join(path, "_target_"), str(error)))
        return _BROKEN
    parameters = fields_of(cls)
    good = {key: value for key, value in children.items() if key in parameters}
    broken = {key for key, value in good.items() if value is _BROKEN}
    found = [
        Fault(_join(path, key), f"there is no such key; {suggestion(str(key), parameters)}")
        for key in children
        if key not in parameters
    ]
    found += [
        Fault(
            _join(path, name), f"is required; set {_join(path, name)}=VALUE or put it in the recipe"
        )
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and name not in children
    ]
    value: Any = _BROKEN
    given = {key: value for key, value in good.items() if key not in broken}
    try:
        if hasattr(cls, "__pydantic_validator__") or not (found or broken):
            value = cls(**given)
    except ValidationError as error:
        found += _validation_faults(error, given, path)
    except ValueError as error:
        found.append(Fault(path, str(error)))
    faults += found
    return _BROKEN if found or broken else value


def _validation_faults(error: ValidationError, given: Mapping[str, Any], path: str) -> list[Fault]:
    """One fault per config path; the alternatives of a union are joined by "or"."""
    messages: dict[str, list[str]] = {}
    for detail in error.errors(include_url=False):
        location = _config_location(detail["loc"], given)
        if detail["type"] == "missing" and len(detail["loc"]) == 1:
            continue  # left out because it is broken, or reported as required already
        where = ".".join([path, *map(str, location)] if path else map(str, location))
        messages.setdefault(where, []).append(_message(detail))
    return [
        Fault(where, " or ".join(dict.fromkeys(alternatives)))
        for where, alternatives in messages.items()
    ]


def _config_location(loc: Sequence[int | str], given: Any) -> list[int | str]:
    """The part of pydantic's location that is in the config; it adds names of union members."""
    location: list[int | str] = []
    node = given
    for part in loc:
        inside = isinstance(node, Mapping | list)
        try:
            node = node[part] if inside else node
        except (KeyError, IndexError, TypeError):
            inside = part == loc[-1]  # a key that is missing
        if inside:
            location.append(part)
    return location


def _message(detail: Mapping[str, Any]) -> str:
    """What was got, and what is wanted."""
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in {"value_error", "assertion_error"}:
        return str(context["error"])
    if kind in {"unexpected_keyword_argument", "extra_forbidden"}:
        return "there is no such key; remove it"
    if kind in {"missing", "missing_keyword_only_argument"}:
        return "is required"
    got = _shown(detail["input"])
    if kind in {"dataclass_type", "dataclass_exact_type", "is_instance_of"}:
        return f"got {got}, wanted a section with _target_: {context.get('class_name', 'a class')}"
    if kind not in _WANTED:
        return f"got {got}: {detail['msg']}"
    message = f"got {got}, wanted {_WANTED[kind].format(**context)}"
    if kind == "literal_error" and isinstance(detail["input"], str):
        match = closest(detail["input"], re.findall(r"'([^']*)'", context["expected"]))
        message += f"; did you mean {match}?" if match else ""
    return message


def _shown(value: Any) -> str:
    """A value as a recipe spells it, cut when it is long."""
    try:
        text = json.dumps(value)
    except TypeError:
        text = type(value).__name__
    return text if len(text) <= 60 else text[:57] + "..."
