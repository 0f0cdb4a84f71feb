"""One combination -> one Hydra configuration, with what could not be applied as faults.

Groups are chosen first; then each value override is looked up in what they yield, so that a
misspelt key gets a close match instead of Hydra's first error; then all good ones are applied.

A recipe has sizes of its own for each compiler: `- sizes/phi3@compiler: ${compiler}` in its
defaults merges `sizes/phi3/<compiler>.yaml` over the compiler's option, whichever is chosen.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.config.closest import closest, suggestion
from pipeline.config.construct import fields_of, settings_class
from pipeline.config.folders import ConfigFolders
from pipeline.config.sweep import Combination
from pipeline.core.errors import Fault

_COMPOSITION_ERRORS = (
    HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, OSError, RecursionError
)  # fmt: skip
"""What a bad file or override raises: Hydra lets PyYAML's and Python's own errors through."""

_SIZES = "sizes/"
"""Folder of the files that hold a recipe's sizes, one for each compiler."""


@dataclass(frozen=True, kw_only=True)
class Composed:
    """What could be composed.

    Attributes:
        config: The configuration, interpolations not yet resolved; None if there is none.
        faults: What could not be applied.
        stand_in: The recipe does not exist; `config` is another one, to check the overrides with.
    """

    config: DictConfig | None
    faults: tuple[Fault, ...]
    stand_in: bool = False


def compose_combination(combination: Combination, folders: ConfigFolders) -> Composed:
    """Compose the recipe with the overrides that are good; the others become faults.

    For an unknown recipe the most similar one stands in, so that the overrides are checked as well.
    """
    name, overrides = combination.recipe, combination.overrides
    recipe_dir = folders.recipe_dir(name)
    if recipe_dir is not None:
        return _compose(name, recipe_dir, overrides, folders)
    known = folders.recipe_names()
    unknown = Fault("", f"there is no recipe {name!r}; {suggestion(name, known)}")
    stand_in = closest(name, known) or "build"
    composed = _compose(stand_in, folders.recipe_dir(stand_in) or folders.conf, overrides, folders)
    return Composed(config=composed.config, faults=(unknown, *composed.faults), stand_in=True)


def _compose(
    recipe: str, recipe_dir: Path, overrides: Sequence[Override], folders: ConfigFolders
) -> Composed:
    faults: list[Fault] = []
    groups: list[str] = []
    values: list[Override] = []
    for override in overrides:
        options = folders.options(override.key_or_group)
        if override.is_hydra_override():
            message = "Hydra itself is not configured here; leave it out"
            faults.append(Fault(override.key_or_group, message))
        elif not options and override.package is None:
            values.append(override)
        elif (fault := _group_fault(override, options)) is not None:
            faults.append(fault)
        else:
            groups.append(str(override.input_line))
    try:
        with warnings.catch_warnings(), initialize_config_dir(str(recipe_dir), version_base="1.3"):
            warnings.simplefilter("ignore", UserWarning)  # a defaults list without `_self_`
            search = _search_path(folders, recipe_dir)
            config, groups, refused = _apply(recipe, search, [], groups)
            faults += refused
            lines = []
            for override in values:
                found = _value_override(override, config)
                if isinstance(found, Fault):
                    faults.append(found)
                else:
                    lines.append(found)
            if lines:
                config, _, refused = _apply(recipe, search, groups, lines)
                faults += refused
    except _COMPOSITION_ERRORS as error:
        return Composed(config=None, faults=(*faults, _recipe_fault(recipe, error)))
    return Composed(config=config, faults=tuple(faults))


def _search_path(folders: ConfigFolders, recipe_dir: Path) -> str:
    """Every folder but the recipe's own, which Hydra searches anyway, as a Hydra override."""
    others = [dir for dir in folders.search if dir != recipe_dir]
    quoted = ["'file://" + str(dir).replace("'", r"\'") + "'" for dir in others]
    return f"hydra.searchpath=[{','.join(quoted)}]"


def _apply(
    recipe: str, search: str, settled: Sequence[str], lines: Sequence[str]
) -> tuple[DictConfig, list[str], list[Fault]]:
    """Compose with `settled` and as many of `lines` as Hydra takes.

    Returns:
        The configuration, the lines that are in it, and a fault for each of the others.
    """
    try:
        return compose(recipe, [search, *settled, *lines]), list(lines), []
    except _COMPOSITION_ERRORS:
        if not lines:
            raise
    config = compose(recipe, [search, *settled])
    taken: list[str] = []
    faults = []
    for line in lines:
        try:
            config = compose(recipe, [search, *settled, *taken, line])
            taken.append(line)
        except _COMPOSITION_ERRORS as error:
            key = line.lstrip("+~").partition("=")[0]
            missing = _missing_by_compiler(recipe, error)
            faults.append(missing or Fault(key, _first_sentences(error)))
    return config, taken, faults


def _group_fault(override: Override, options: Sequence[str]) -> Fault | None:
    """What is wrong with the choice of an option, such as `compiler=trtrtx`."""
    group = override.key_or_group
    value = override.value()
    if override.is_delete():
        return Fault(group, f"cannot be left out; allowed: {', '.join(options)}")
    if not options:
        return Fault(group, "there is no such group of options")
    if not isinstance(value, str):
        wanted = f"choose one of {', '.join(options)}, and set its values by {group}.KEY=VALUE"
        return Fault(group, f"got {override.get_value_string()}; {wanted}")
    if value not in options:
        return Fault(group, f"there is no option {value!r}; {suggestion(value, options)}")
    return None


def _value_override(override: Override, config: DictConfig) -> str | Fault:
    """The line that Hydra needs for this override, or why its key cannot be set."""
    key = override.key_or_group
    line = str(override.input_line)
    node: Any = OmegaConf.to_container(config, resolve=False)
    root = node
    parts = key.split(".")
    for depth, part in enumerate(parts):
        section = ".".join(parts[:depth])
        if isinstance(node, list):
            if not (part.isdecimal() and int(part) < len(node)):
                return Fault(key, f"{section} is a list with items 0 to {len(node) - 1}")
            node = node[int(part)]
        elif not isinstance(node, Mapping):
            return Fault(key, f"{section} is a value, not a section; set {section}=VALUE")
        elif part.startswith("_"):
            return Fault(key, f"cannot be set; choose another option, {section}=OPTION")
        elif part in node:
            node = node[part]
        elif depth == len(parts) - 1 and _may_have(node, part) and not override.is_delete():
            return "++" + line.lstrip("+")
        else:
            return Fault(key, f"there is no such key; {_key_suggestion(part, section, node, root)}")
    # `+key=` asks Hydra to add a key, which fails on one that exists; setting it is what was meant.
    return line.lstrip("+")


def _may_have(node: Mapping[str, Any], key: str) -> bool:
    """Whether the object behind a section has a field that the YAML does not list."""
    return key in _fields(node)


def _fields(node: Mapping[str, Any]) -> frozenset[str]:
    try:
        return frozenset(fields_of(settings_class(node["_target_"])))
    except (KeyError, ImportError):
        return frozenset()


def _key_suggestion(key: str, section: str, node: Mapping[str, Any], root: Any) -> str:
    """The keys beside the misspelt one; failing those, the same key in another section."""
    siblings = {str(name) for name in node if not str(name).startswith("_")} | _fields(node)
    prefix = f"{section}." if section else ""
    if closest(key, siblings) is None:
        elsewhere = [path for path in _paths(root) if path.rpartition(".")[2] == key]
        if elsewhere:
            return f"did you mean {' or '.join(elsewhere)}?"
    return suggestion(prefix + key, [prefix + name for name in siblings])


def _paths(node: Any, path: str = "") -> Iterator[str]:
    """Every dotted key path below a node."""
    if isinstance(node, Mapping):
        for name, child in node.items():
            if not str(name).startswith("_"):
                below = f"{path}.{name}" if path else str(name)
                yield below
                yield from _paths(child, below)


def _recipe_fault(recipe: str, error: Exception) -> Fault:
    """Why a recipe cannot be composed, whatever the overrides."""
    if missing := _missing_by_compiler(recipe, error):
        return missing
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        if error.options:
            hint = suggestion(option, error.options)
            return Fault(group, f"recipe {recipe} asks for {option!r}; {hint}")
    return Fault("", f"recipe {recipe} cannot be read: {_first_sentences(error)}")


def _missing_by_compiler(recipe: str, error: Exception) -> Fault | None:
    """The fault of a compiler that lacks what is named after it: sizes of the recipe, a runner.

    None for other errors.
    """
    if not isinstance(error, MissingConfigException) or not error.missing_cfg_file:
        return None
    group, _, compiler = str(error.missing_cfg_file).rpartition("/")
    known = ", ".join(error.options or ()) or "none"
    if group == "runner":
        message = (
            f"no runner is called like compiler={compiler}; choose one: runner=OPTION, {known}"
        )
        return Fault("runner", message)
    if not group.startswith(_SIZES):
        return None
    return Fault(
        "compiler",
        f"recipe {recipe} has no sizes for compiler={compiler}; it has them for: {known}. Choose "
        f"one of these, or write {group}/{compiler}.yaml beside the recipe, with max_batch_size, "
        "max_seq_len and what else that compiler wants",
    )


def _first_sentences(error: Exception) -> str:
    """Hydra's message in one line, less the search path that it appends."""
    if isinstance(error, RecursionError):
        return "it contains itself"
    text = str(error) or str(error.__cause__)
    text = text.partition("Config search path")[0]
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())
