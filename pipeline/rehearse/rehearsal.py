"""Rehearse a recipe: the whole line on random weights, in every format that the recipe offers.

Everything goes into one throw-away folder: weights, cache, runs and a registry that is marked as a
rehearsal's. A format whose compiler cannot work on this machine goes as far as it can, and the
result says where it stopped.
"""

from __future__ import annotations

import dataclasses
import logging
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.build import BuildOptions, build
from pipeline.commands.outcome import failure_of
from pipeline.config.recipe import Recipe
from pipeline.core.cache import StageCache
from pipeline.core.errors import ExitCode, IncompatibleError, PipelineError
from pipeline.formats.trtllm.compiler import TrtLlmCompiler
from pipeline.formats.trtllm.convert.stage import convert_trtllm
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
    registry = FolderRegistry(path=folder / "registry")
    mark_throwaway(registry.path)
    done = []
    for name, (recipe, config) in recipes.items():
        log.info("Rehearsing compiler=%s", name)
        started = time.perf_counter()
        prepared = dataclasses.replace(
            _full_size(recipe, folder) if full_size else _small(recipe, folder), registry=registry
        )
        run_dir = folder / "runs" / name
        run_dir.mkdir(parents=True)
        try:
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


def _small(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe in small sizes, on random weights."""
    shape = small_spec(recipe.shape)
    calibrate, judge = PydocTopics(part="calibrate"), PydocTopics(part="judge")
    return dataclasses.replace(
        recipe,
        shape=shape,
        source=_source(shape, folder, calibrate),
        calibration=small_calibration(recipe.calibration, calibrate),
        quantizer=small_quantizer(recipe.quantizer, shape),
        compiler=small_settings(recipe.compiler),
        acceptance=small_acceptance(recipe.acceptance, judge),
    )


def _full_size(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe as it is, on random weights and with little text."""
    calibrate, judge = PydocTopics(part="calibrate"), PydocTopics(part="judge")
    small = small_acceptance(recipe.acceptance, judge)
    return dataclasses.replace(
        recipe,
        source=_source(recipe.shape, folder, calibrate),
        calibration=small_calibration(recipe.calibration, calibrate),
        quantizer=small_quantizer(recipe.quantizer, recipe.shape),
        acceptance=dataclasses.replace(small, time_limit_s=recipe.acceptance.time_limit_s),
    )


def _source(shape: Any, folder: Path, text: PydocTopics) -> RandomSource:
    return RandomSource(shape=shape, folder=folder / "weights", documents=text.documents())


def _run(
    recipe: Recipe, config: Mapping[str, Any], cache_dir: Path, run_dir: Path
) -> tuple[State, str, str]:
    """Build it; where the compiler cannot work here, do what comes before it."""
    compiler = recipe.compiler
    if isinstance(compiler, TrtLlmCompiler):
        try:
            compiler.check_machine(recipe.target)
        except PipelineError as error:
            if not isinstance(error, IncompatibleError):
                raise
            return "stopped", *_up_to_the_command(recipe, compiler, cache_dir, str(error))
    # A key of its own, in CI too: a rehearsal proves nothing to anybody, and leaves nothing behind.
    environ = {"ENGINESMITH_CONFIG": str(run_dir.parent.parent / "config")}
    options = BuildOptions(rebuild=False, config=config, cache_dir=cache_dir, environ=environ)
    outcome = build(recipe, run_dir, options)
    state: State = "good" if outcome.exit_code is ExitCode.OK else "failed"
    return state, f"package {outcome.reference}", outcome.message


def _up_to_the_command(
    recipe: Recipe, compiler: TrtLlmCompiler, cache_dir: Path, reason: str
) -> tuple[str, str]:
    """Fetch, quantize, convert, verify; the command line that a machine with the card would run."""
    cache = StageCache(root=cache_dir)
    checkpoint = recipe.quantizer.quantize(recipe.source.fetch(), recipe.calibration, cache)
    converted = convert_trtllm(checkpoint.dir, checkpoint.digest, compiler.conversion, cache)
    size_bytes = (converted.dir / "rank0.safetensors").stat().st_size
    reached = f"TensorRT-LLM checkpoint, {size_bytes / 1e6:.1f} MB, every tensor checked"
    first_line = reason.splitlines()[0]
    return reached, f"{first_line}; not run: {shlex.join(compiler.command)}"
