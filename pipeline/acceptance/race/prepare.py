"""Recipe -> weights and artifact, through the stage cache, in a process of their own.

Calibration may use the GPU, and a CUDA context stays until its process ends: here it would be on
the card during the race, and would look like a stranger's process after it.
"""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core.atomic_folder import atomic_folder
from pipeline.core.cache import StageCache, locked
from pipeline.core.errors import ExitCode, PipelineError
from pipeline.core.launch import end_with_parent
from pipeline.core.values import Engine, Weights, digest_of
from pipeline.model.random_model import write_random_model
from pipeline.rehearse.random_source import RandomSource
from pipeline.rehearse.shrink import small_calibration, small_quantizer
from pipeline.sources.text.topics import PydocTopics

if TYPE_CHECKING:
    from pipeline.commands.outcome import Outcome
    from pipeline.config.recipe import Recipe

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What is raced.

    Attributes:
        weights: The source model, for the peers.
        engine: Our artifact: the FP8 checkpoint as it is served.
    """

    weights: Weights
    engine: Engine


class PreparationError(PipelineError):
    """The artifact was not made; the code is that of what went wrong."""

    def __init__(self, message: str, exit_code: ExitCode) -> None:
        self.exit_code = exit_code
        super().__init__(message)


def on_random_weights(recipe: Recipe, cache_dir: Path) -> Recipe:
    """The recipe on random weights of its shape, calibrated on little text; downloads nothing.

    Speed does not depend on the values. The folder's name is the digest of the shape, so that the
    next command finds the weights again.
    """
    calibrate = PydocTopics(part="calibrate")
    name = digest_of({"shape": dataclasses.asdict(recipe.shape)})[:24]
    source = RandomSource(
        shape=recipe.shape,
        folder=cache_dir / "random-weights" / name,
        documents=calibrate.documents(),
    )
    return dataclasses.replace(
        recipe,
        source=source,
        calibration=small_calibration(recipe.calibration, calibrate),
        quantizer=small_quantizer(recipe.quantizer, recipe.shape),
    )


def prepare(recipe: Recipe, cache_dir: Path, log_dir: Path) -> Prepared:
    """Fetch, quantize and pack, or take it from the cache.

    Args:
        recipe: With the checkpoint compiler.
        cache_dir: Root of the stage cache.
        log_dir: For the tools' logs.

    Raises:
        PreparationError: A stage failed.
    """
    spawn = multiprocessing.get_context("spawn")
    # A worker whose parent was killed would wait for more to do, for ever.
    with ProcessPoolExecutor(
        1, mp_context=spawn, initializer=end_with_parent, initargs=(os.getpid(),)
    ) as pool:
        try:
            made = pool.submit(_prepare_here, recipe, cache_dir, log_dir).result()
        except BrokenProcessPool as error:
            raise PreparationError(
                "the process that makes the artifact was killed, by the kernel if memory ran out "
                "(dmesg tells); free some, then run the same command again",
                ExitCode.FAILED,
            ) from error
    if not isinstance(made, Prepared):
        raise PreparationError(made.message, made.exit_code)
    return made


def _prepare_here(recipe: Recipe, cache_dir: Path, log_dir: Path) -> Prepared | Outcome:
    """In the child: the value, or what went wrong; not every exception can be pickled."""
    from pipeline.commands.outcome import failure_of
    from pipeline.commands.screen import screen_logging

    with screen_logging():
        try:
            return make_artifact(recipe, cache_dir, log_dir)
        except Exception as error:
            return failure_of(error)


def make_artifact(recipe: Recipe, cache_dir: Path, log_dir: Path) -> Prepared:
    """As `prepare`, in this process."""
    cache = StageCache(root=cache_dir)
    if isinstance(recipe.source, RandomSource):
        _write_random(recipe.source, cache_dir)
    weights = recipe.source.fetch()
    checkpoint = recipe.quantizer.quantize(weights, recipe.calibration, cache)
    engine = recipe.compiler.compile(checkpoint, recipe.target, cache, log_dir)
    return Prepared(weights=weights, engine=engine)


def _write_random(source: RandomSource, cache_dir: Path) -> None:
    """Write the weights so that a killed command leaves nothing that is taken for whole."""
    with locked(cache_dir / "locks" / f"random-{source.folder.name}.lock"):
        if source.folder.is_dir():
            return
        log.info("Writing random weights, %.1f GB", 2 * source.shape.params / 1e9)
        with atomic_folder(source.folder) as private:
            write_random_model(
                source.shape, private, documents=list(source.documents), seed=source.seed
            )
