"""Recipes and overrides -> jobs, each with its object or with all of its faults."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from pipeline.config.compose import compose_combination
from pipeline.config.folders import ConfigFolders
from pipeline.config.locate import ConfigFile, locate
from pipeline.config.recipe import Recipe
from pipeline.config.sweep import Combination, combinations
from pipeline.config.validate import validate
from pipeline.core.errors import Fault, RecipeError

log = logging.getLogger(__name__)

_SAME_WEIGHTS = frozenset({"source.acknowledge_licence"})
"""Keys of the source that say nothing about which weights it brings."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One recipe with one value for each override.

    Attributes:
        recipe: Name of the recipe.
        swept: The overrides in which this job differs from its neighbours.
        config: Resolved configuration, plain dicts and lists; empty if it could not be composed.
        typed: The recipe as an object; None if there are faults.
        faults: All of them.
    """

    recipe: str
    swept: tuple[str, ...]
    config: Mapping[str, Any]
    typed: Recipe | None
    faults: tuple[Fault, ...]

    @property
    def value(self) -> Recipe:
        """The recipe as an object.

        Raises:
            RecipeError: It has faults.
        """
        if self.typed is None:
            raise RecipeError(self.faults)
        return self.typed


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """The jobs of a run, and the faults of the command line, which belong to all of them."""

    jobs: tuple[Job, ...]
    faults: tuple[Fault, ...]

    @property
    def all_faults(self) -> tuple[Fault, ...]:
        """Those of the command line and of every job, each once."""
        return tuple(dict.fromkeys([*self.faults, *(f for job in self.jobs for f in job.faults)]))

    def one_job(self) -> Job:
        """The job of a command line without sweeps.

        Raises:
            RecipeError: With all faults.
        """
        self.raise_faults()
        return self.jobs[0]

    def raise_faults(self) -> None:
        """Go on only with what is good.

        Raises:
            RecipeError: With all faults.
        """
        if self.all_faults:
            raise RecipeError(self.all_faults)


def load(
    recipes: str,
    overrides: Sequence[str],
    *,
    folders: ConfigFolders,
    multirun: bool = False,
) -> Loaded:
    """Compose and check everything; pure but for reading YAML.

    Args:
        recipes: Name of a recipe; with `multirun` several, with commas between.
        overrides: In Hydra's grammar: `compiler=trtrtx`, `compiler.max_batch_size=8`.
        folders: Where they lie.
        multirun: One job for each combination of recipes and values.
    """
    found, faults = combinations(recipes, overrides, multirun=multirun, folders=folders)
    return Loaded(
        jobs=tuple(_job(combination, folders) for combination in found), faults=tuple(faults)
    )


def config_text(config: Mapping[str, Any]) -> str:
    """A composed recipe as YAML."""
    text: str = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
    return text.rstrip()


def _job(combination: Combination, folders: ConfigFolders) -> Job:
    composed = compose_combination(combination, folders)
    faults = [*composed.faults, *_unnamed_source(combination)]
    config: Mapping[str, Any] = {}
    typed = None
    keys = tuple(override.key_or_group for override in combination.overrides)
    values = tuple(key for key in keys if not folders.options(key))
    if composed.config is not None:
        checked = validate(composed.config)
        config, typed = checked.config, checked.recipe
        if typed is not None and "compiler.max_batch_size" in keys:
            config, typed = _with_fitting_targets(config, typed, keys)
        faults += [_located(fault, values, composed.files) for fault in checked.faults]
    if composed.stand_in:
        below = tuple(f"{key}." for key in values)
        faults = [
            fault
            for fault in faults
            if fault is composed.faults[0] or fault.path in keys or fault.path.startswith(below)
        ]
    return Job(
        recipe=combination.recipe,
        swept=combination.swept,
        config={} if composed.stand_in else config,
        typed=None if faults else typed,
        faults=tuple(dict.fromkeys(faults)),
    )


def _with_fitting_targets(
    config: Mapping[str, Any], recipe: Recipe, keys: Sequence[str]
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


def _located(fault: Fault, keys: Sequence[str], files: Sequence[ConfigFile]) -> Fault:
    """The fault with its file and line, unless the command line set the value."""
    path = f"{fault.path}."
    if any(path.startswith(f"{key}.") or f"{key}.".startswith(path) for key in keys):
        return fault
    return replace(fault, where=locate(fault.path, files))


def _unnamed_source(combination: Combination) -> list[Fault]:
    """Other weights need another name: nobody's fine-tune is to be published as `phi3`."""
    keys = [override.key_or_group for override in combination.overrides]
    sources = [key for key in keys if key.split(".")[0] == "source" and key not in _SAME_WEIGHTS]
    if not sources or "name" in keys:
        return []
    message = (
        f"other weights would be published as {combination.recipe!r}; "
        "say under which name instead: name=NAME"
    )
    return [Fault(sources[0], message)]
