"""A recipe's name and overrides -> one job: its typed recipe, or all of its faults."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import yaml
from omegaconf import DictConfig, ListConfig, Node, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException
from omegaconf.grammar_parser import parse
from pydantic import ValidationError

from pipeline.config.compose import (
    ConfigFolders,
    closest,
    compose_recipe,
    locate,
    read_overrides,
    suggestion,
)
from pipeline.config.recipe import Recipe
from pipeline.core.errors import Fault, RecipeError
from pipeline.core.settings import OneOf, fill_settings

log = logging.getLogger(__name__)

_SAME_WEIGHTS = frozenset({"source.acknowledge_licence"})
"""Keys of the source that say nothing about which weights it brings."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One recipe with its overrides."""

    recipe: str
    config: Mapping[str, Any]  # resolved, plain dicts and lists; empty if it could not be composed
    typed: Recipe | None  # the recipe as an object; None if there are faults
    faults: tuple[Fault, ...]  # all of them, those of the command line first

    @property
    def value(self) -> Recipe:
        """The recipe; a `RecipeError` if it has faults."""
        if self.typed is None:
            raise RecipeError(self.faults)
        return self.typed

    @property
    def text(self) -> str:
        text: str = yaml.safe_dump(dict(self.config), sort_keys=False, allow_unicode=True)
        return text.rstrip()


def load(recipe: str, overrides: Sequence[str], *, folders: ConfigFolders) -> Job:
    """Compose and check everything; pure but for reading YAML."""
    name = recipe.removesuffix(".yaml")
    if name not in folders.recipe_names():
        return Job(recipe=name, config={}, typed=None, faults=(folders.unknown(name),))
    given, faults = read_overrides(overrides)
    composed, refused, files = compose_recipe(name, given, folders)
    keys = [override.key_or_group for override in given]
    found = [*refused, *_unnamed_source(name, keys)]
    config: Mapping[str, Any] = {}
    typed = None
    if composed is not None:
        config, typed, broken = validate(composed)
        values = [key for key in keys if not folders.options(key)]
        if typed is not None and "compiler.max_batch_size" in keys:
            config, typed = _with_fitting_targets(config, typed, keys)
        for fault in broken:  # with its file and line, unless the command line set the value
            given_here = any(_within(fault.path, key) or _within(key, fault.path) for key in values)
            found.append(fault if given_here else replace(fault, where=locate(fault.path, files)))
    faults += found
    return Job(
        recipe=name,
        config=config,
        typed=None if faults else typed,
        faults=tuple(dict.fromkeys(faults)),
    )


def registry_overrides(url: str | None) -> tuple[str, ...]:
    """The overrides that `--registry URL` stands for; none for None."""
    if url is None:
        return ()
    scheme, found, path = url.partition("://")
    quoted = "'" + url.replace("'", "\\'") + "'"
    if not found:
        return ("registry=folder", f"registry.path={quoted}")
    if scheme == "file":
        return registry_overrides(path)
    if scheme not in ("s3", "oci"):
        message = f"{url!r} is no registry: write a folder, file:///PATH, s3://... or oci://..."
        raise RecipeError([Fault("--registry", message)])
    return (f"registry={scheme}", f"registry.url={quoted}")


def _within(path: str, key: str) -> bool:
    return f"{path}.".startswith(f"{key}.")


def _with_fitting_targets(
    config: Mapping[str, Any], recipe: Recipe, keys: Collection[str]
) -> tuple[Mapping[str, Any], Recipe]:
    """Less the recipe's targets at a larger batch than the command line asks for, and says so."""
    acceptance, limit = recipe.acceptance, recipe.compiler.limits.max_batch_size
    left_out = [load.name for load in acceptance.targets if load.batch > limit]
    if not left_out or any(key.startswith("acceptance.targets") for key in keys):
        return config, recipe
    log.warning("Left out, since the batch is %d at most: %s", limit, ", ".join(left_out))
    section = config["acceptance"]
    kept = [load for load in section["targets"] if load["name"] not in left_out]
    targets = tuple(load for load in acceptance.targets if load.name not in left_out)
    return (
        {**config, "acceptance": {**section, "targets": kept}},
        replace(recipe, acceptance=replace(acceptance, targets=targets)),
    )


def _unnamed_source(recipe: str, keys: Collection[str]) -> list[Fault]:
    """Other weights need another name: no fine-tune is to be published as `phi3`."""
    sources = [key for key in keys if key.split(".")[0] == "source" and key not in _SAME_WEIGHTS]
    if not sources or "name" in keys:
        return []
    message = (
        f"other weights would be published as {recipe!r}; say under which name instead: name=NAME"
    )
    return [Fault(sources[0], message)]


Location = tuple[int | str, ...]


def validate(config: DictConfig) -> tuple[Mapping[str, Any], Recipe | None, list[Fault]]:
    """Resolve a configuration to plain dicts and lists, and check it whole."""
    broken: dict[str, str] = {}
    plain = _resolve(config, "", broken)
    faults = [Fault(path, message) for path, message in broken.items() if message]
    recipe = None
    try:
        recipe = fill_settings(Recipe, plain)
    except ValidationError as error:
        found = _validation_faults(error, plain)
        # Less those that say only that a broken value is not there.
        faults += [one for one in found if not any(_within(path, one.path) for path in broken)]
    return plain, None if faults else recipe, faults


def _resolve(node: Any, path: str, broken: dict[str, str]) -> Any:
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
                children[key] = _resolve(node[key], below, broken)
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
    got = json.dumps(detail["input"], default=str)
    return f"got {got if len(got) <= 60 else f'{got[:57]}...'}, {wanted}{choose}"


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
    if not isinstance(node, Mapping):
        return []
    found = []
    for name, child in node.items():
        below = f"{path}.{name}" if path else str(name)
        found += [below, *_paths(child, below)]
    return found
