"""One combination -> one Hydra configuration, with what could not be applied as faults.

Hydra stops at its first error, so what fails together is tried one by one. A misspelt key is no
error here: it is set, and the validation of the whole refuses it with the keys that there are.

A recipe may have sizes of its own for a compiler: `- optional sizes/phi3@compiler: ${compiler}` in
its defaults merges `sizes/phi3/<compiler>.yaml`, where there is one, over the compiler's option.
That option chooses the runner, unless `runner=` does.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from pipeline.config.closest import closest, suggestion
from pipeline.config.folders import ConfigFolders
from pipeline.config.locate import ConfigFile, config_files
from pipeline.config.sweep import Combination
from pipeline.core.errors import Fault, RecipeError

_COMPOSITION_ERRORS = (
    HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, OSError, RecursionError
)  # fmt: skip
"""What a bad file or override raises: Hydra lets PyYAML's and Python's own errors through."""


@dataclass(frozen=True, kw_only=True)
class Composed:
    """What could be composed.

    Attributes:
        config: The configuration, interpolations not yet resolved; None if there is none.
        faults: What could not be applied.
        files: Those that it was made of, the strongest first.
        stand_in: The recipe does not exist; `config` is another one, to check the overrides with.
    """

    config: DictConfig | None
    faults: tuple[Fault, ...]
    files: tuple[ConfigFile, ...] = ()
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
            lines = [_value_line(override) for override in values]
            faults += [line for line in lines if isinstance(line, Fault)]
            good = [line for line in lines if isinstance(line, str)]
            config, refused = _apply(recipe, search, [*groups, *good])
            faults += refused
    except _COMPOSITION_ERRORS as error:
        return Composed(config=None, faults=(*faults, _recipe_fault(recipe, error)))
    choices = OmegaConf.to_container(config.hydra.runtime.choices)
    with open_dict(config):
        del config["hydra"]
    files = config_files(recipe, dict(cast("dict[str, object]", choices)), folders.search)
    return Composed(config=config, faults=tuple(faults), files=files)


INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
"""What Hydra can tell about a composition."""


def show_info(what: str, recipe: str, overrides: Sequence[str], folders: ConfigFolders) -> None:
    """Let Hydra print how it composes a recipe.

    Raises:
        RecipeError: There is no such recipe, or it cannot be composed.
    """
    recipe_dir = folders.recipe_dir(recipe)
    if recipe_dir is None:
        hint = suggestion(recipe, folders.recipe_names())
        raise RecipeError([Fault("", f"there is no recipe {recipe!r}; {hint}")])
    try:
        with initialize_config_dir(str(recipe_dir), version_base="1.3"):
            hydra = GlobalHydra.instance().hydra
            assert hydra is not None
            hydra.show_info(what, recipe, [_search_path(folders, recipe_dir), *overrides])
    except _COMPOSITION_ERRORS as error:
        raise RecipeError([_recipe_fault(recipe, error)]) from error


def _search_path(folders: ConfigFolders, recipe_dir: Path) -> str:
    """Every folder but the recipe's own, which Hydra searches anyway, as a Hydra override."""
    others = [dir for dir in folders.search if dir != recipe_dir]
    quoted = ["'file://" + str(dir).replace("'", r"\'") + "'" for dir in others]
    return f"hydra.searchpath=[{','.join(quoted)}]"


def _apply(recipe: str, search: str, lines: Sequence[str]) -> tuple[DictConfig, list[Fault]]:
    """Compose with as many of `lines` as Hydra takes; a fault for each of the others."""

    def composed(*overrides: str) -> DictConfig:
        return compose(recipe, [search, *overrides], return_hydra_config=True)

    try:
        return composed(*lines), []
    except _COMPOSITION_ERRORS:
        if not lines:
            raise
    config = composed()
    taken: list[str] = []
    faults = []
    for line in lines:
        try:
            config = composed(*taken, line)
            taken.append(line)
        except _COMPOSITION_ERRORS as error:
            key = line.lstrip("+~").partition("=")[0]
            faults.append(Fault(key, _first_sentences(error)))
    return config, faults


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


def _value_line(override: Override) -> str | Fault:
    """The line that sets a value, or why it may not be set; pydantic knows which keys exist."""
    key, line = override.key_or_group, str(override.input_line)
    if key.rpartition(".")[2] == "kind":
        section = key.rpartition(".")[0]
        return Fault(key, f"cannot be set; choose another option, {section}=OPTION")
    return line if override.is_delete() else "++" + line.lstrip("+")


def _recipe_fault(recipe: str, error: Exception) -> Fault:
    """Why a recipe cannot be composed, whatever the overrides."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        if error.options:
            hint = suggestion(option, error.options)
            return Fault(group, f"recipe {recipe} asks for {option!r}; {hint}")
    return Fault("", f"recipe {recipe} cannot be read: {_first_sentences(error)}")


def _first_sentences(error: Exception) -> str:
    """Hydra's message in one line, less the search path that it appends."""
    if isinstance(error, RecursionError):
        return "it contains itself"
    text = str(error)
    if not text or text.startswith("Error merging override"):
        text = str(error.__cause__ or error)
    text = text.partition("Config search path")[0]
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())
