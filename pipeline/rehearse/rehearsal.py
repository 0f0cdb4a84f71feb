"""Rehearse a recipe: the whole line on random weights, in every format that the recipe offers.

Everything goes into one throw-away folder: weights, cache, runs and a registry that is marked as a
rehearsal's. A format whose compiler cannot work on this machine goes as far as it can, and the
result says where it stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shlex
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.build import BuildOptions, build
from pipeline.config.recipe import Recipe
from pipeline.core.cache import StageCache
from pipeline.core.errors import ExitCode, IncompatibleError, PipelineError
from pipeline.formats.spec import CardCompiler
from pipeline.outcome import failure_of
from pipeline.registry.policy import mark_throwaway
from pipeline.registry.stores.folder import FolderRegistry
from pipeline.rehearse.random_source import RandomSource
from pipeline.rehearse.shrink import (
    small_acceptance,
    small_calibration,
    small_quantizer,
    small_settings,
    small_spec,
)
from pipeline.sources.text.topics import PydocTopics

log = logging.getLogger(__name__)

State = Literal["good", "stopped", "failed"]


@dataclass(frozen=True, kw_only=True)
class Rehearsed:
    """How far one format went.

    Attributes:
        format: Name of the compiler.
        state: `good`: all of it; `stopped`: everything that can be checked here; `failed`.
        reached: The last thing that was done, for people.
        detail: The verdict, why it stopped, or the error.
        exit_code: 0 for good and stopped.
        seconds: Wall clock.
    """

    format: str
    state: State
    reached: str
    detail: str
    exit_code: ExitCode
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "exit_code": int(self.exit_code), "seconds": round(self.seconds, 2)}


def rehearse(
    recipes: Mapping[str, tuple[Recipe, Mapping[str, Any]]], folder: Path, *, full_size: bool
) -> tuple[Rehearsed, ...]:
    """Rehearse each format in turn; one that fails does not stop the others.

    Args:
        recipes: Compiler name -> the recipe composed with it, and its plain configuration.
        folder: An empty folder; gets everything.
        full_size: Keep the real shape and the real sizes; only the weights are random.
    """
    mark_throwaway(folder / "registry")
    done = []
    for name, (recipe, config) in recipes.items():
        log.info("Rehearsing compiler=%s", name)
        started = time.perf_counter()
        prepared = _rehearsed(recipe, folder, full_size=full_size)
        run_dir = folder / "runs" / name
        run_dir.mkdir(parents=True)
        try:
            with _registry_silent():
                state, reached, detail = _run(prepared, config, folder / "cache", run_dir)
            code = ExitCode.OK if state != "failed" else ExitCode.NOT_ACCEPTED
        except Exception as error:
            failure = failure_of(error)
            state, reached, detail, code = "failed", "", failure.message, failure.exit_code
        seconds = time.perf_counter() - started
        done.append(
            Rehearsed(
                format=name,
                state=state,
                reached=reached,
                detail=detail,
                exit_code=code,
                seconds=seconds,
            )
        )
    return tuple(done)


def _rehearsed(recipe: Recipe, folder: Path, *, full_size: bool) -> Recipe:
    """The recipe on random weights and little text, in small sizes unless they are to stay."""
    calibrate, judge = PydocTopics(part="calibrate"), PydocTopics(part="judge")
    shape = recipe.shape if full_size else small_spec(recipe.shape)
    acceptance = small_acceptance(recipe.acceptance, judge)
    if full_size:
        limit_s = recipe.acceptance.time_limit_s
        acceptance = dataclasses.replace(acceptance, time_limit_s=limit_s)
    return dataclasses.replace(
        recipe,
        shape=shape,
        source=RandomSource(
            shape=shape, folder=folder / "weights", documents=calibrate.documents()
        ),
        calibration=small_calibration(recipe.calibration, calibrate),
        quantizer=small_quantizer(recipe.quantizer, shape),
        compiler=recipe.compiler if full_size else small_settings(recipe.compiler),
        acceptance=acceptance,
        registry=FolderRegistry(path=folder / "registry"),
    )


@contextlib.contextmanager
def _registry_silent() -> Iterator[None]:
    """Hide what the registry logs: its key and its packages are thrown away."""
    registry = logging.getLogger("pipeline.registry")
    before = registry.level
    registry.setLevel(logging.WARNING)
    try:
        yield
    finally:
        registry.setLevel(before)


def _run(
    recipe: Recipe, config: Mapping[str, Any], cache_dir: Path, run_dir: Path
) -> tuple[State, str, str]:
    """Build it; where the compiler cannot work here, do what comes before it."""
    compiler = recipe.compiler
    if isinstance(compiler, CardCompiler):
        try:
            compiler.check_machine(recipe.target)
        except PipelineError as error:
            if not isinstance(error, IncompatibleError):
                raise
            return "stopped", *_up_to_the_command(recipe, compiler, cache_dir, str(error))
    # A key of its own, in CI too: a rehearsal proves nothing, and leaves nothing behind.
    environ = {"ENGINESMITH_CONFIG": str(run_dir.parent.parent / "config")}
    options = BuildOptions(rebuild=False, config=config, cache_dir=cache_dir, environ=environ)
    outcome = build(recipe, run_dir, options)
    state: State = "good" if outcome.exit_code is ExitCode.OK else "failed"
    return state, f"package {outcome.reference}", outcome.message


def _up_to_the_command(
    recipe: Recipe, compiler: CardCompiler, cache_dir: Path, reason: str
) -> tuple[str, str]:
    """Fetch, quantize, convert, verify; the command line that a machine with the card would run."""
    cache = StageCache(root=cache_dir)
    checkpoint = recipe.quantizer.quantize(recipe.source.fetch(), recipe.calibration, cache)
    converted = compiler.convert(checkpoint, cache)
    size_bytes = sum(file.size_bytes for file in converted.files)
    reached = f"{compiler.format} checkpoint, {size_bytes / 1e6:.1f} MB, every tensor checked"
    first_line = reason.splitlines()[0]
    return reached, f"{first_line}; not run: {shlex.join(compiler.command)}"
