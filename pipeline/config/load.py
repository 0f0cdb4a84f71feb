"""Recipes and overrides -> jobs, each with its object or with all of its faults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config.compose import compose_combination
from pipeline.config.construct import construct
from pipeline.config.folders import ConfigFolders
from pipeline.config.sweep import Combination, combinations
from pipeline.core.errors import Fault, RecipeError

_SAME_WEIGHTS = frozenset({"source.acknowledge_licence"})
"""Keys of the source that say nothing about which weights it brings."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One recipe with one value for each override.

    Attributes:
        recipe: Name of the recipe.
        swept: The overrides in which this job differs from its neighbours.
        config: Resolved configuration, plain dicts and lists; empty if it could not be composed.
        value: The `pipeline.build.Recipe`; None if there are faults.
        faults: All of them.
    """

    recipe: str
    swept: tuple[str, ...]
    config: Mapping[str, Any]
    value: Any
    faults: tuple[Fault, ...]


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
        if self.all_faults:
            raise RecipeError(self.all_faults)
        return self.jobs[0]


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


def _job(combination: Combination, folders: ConfigFolders) -> Job:
    composed = compose_combination(combination, folders)
    faults = [*composed.faults, *_unnamed_source(combination)]
    config: Mapping[str, Any] = {}
    value = None
    if composed.config is not None:
        constructed = construct(composed.config)
        faults += constructed.faults
        config, value = constructed.config, constructed.value
    if composed.stand_in:
        keys = [override.key_or_group for override in combination.overrides]
        values = tuple(f"{key}." for key in keys if not folders.options(key))
        faults = [
            fault
            for fault in faults
            if fault is composed.faults[0] or fault.path in keys or fault.path.startswith(values)
        ]
    return Job(
        recipe=combination.recipe,
        swept=combination.swept,
        config={} if composed.stand_in else config,
        value=None if faults else value,
        faults=tuple(dict.fromkeys(faults)),
    )


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
