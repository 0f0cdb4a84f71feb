"""A recipe's name and overrides -> one job: its typed recipe, or all of its faults."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from pipeline.config.compose import ConfigFile, compose_recipe, locate, read_overrides
from pipeline.config.folders import ConfigFolders
from pipeline.config.recipe import Recipe
from pipeline.config.validate import validate
from pipeline.core.errors import Fault, RecipeError

log = logging.getLogger(__name__)

_SAME_WEIGHTS = frozenset({"source.acknowledge_licence"})
"""Keys of the source that say nothing about which weights it brings."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One recipe with its overrides.

    Attributes:
        config: Resolved configuration, plain dicts and lists; empty if it could not be composed.
        typed: The recipe as an object; None if there are faults.
        faults: All of them, those of the command line first.
    """

    recipe: str
    config: Mapping[str, Any]
    typed: Recipe | None
    faults: tuple[Fault, ...]

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
        found += [_located(fault, values, files) for fault in broken]
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


def _located(fault: Fault, keys: Sequence[str], files: Sequence[ConfigFile]) -> Fault:
    """The fault with its file and line, unless the command line set the value."""
    if any(_within(fault.path, key) or _within(key, fault.path) for key in keys):
        return fault
    return replace(fault, where=locate(fault.path, files))


def _unnamed_source(recipe: str, keys: Collection[str]) -> list[Fault]:
    """Other weights need another name: no fine-tune is to be published as `phi3`."""
    sources = [key for key in keys if key.split(".")[0] == "source" and key not in _SAME_WEIGHTS]
    if not sources or "name" in keys:
        return []
    message = (
        f"other weights would be published as {recipe!r}; say under which name instead: name=NAME"
    )
    return [Fault(sources[0], message)]
