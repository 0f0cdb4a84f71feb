"""`enginesmith rehearse`: the whole line on random weights, in every format that a recipe offers.

Everything goes into one throw-away folder: weights, cache, runs and a registry that is marked as a
rehearsal's. A format whose compiler cannot work on this machine goes as far as it can, and the
result says where it stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shlex
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from pipeline.answer import Answer, screen_logging
from pipeline.build import build
from pipeline.config.folders import ConfigFolders, config_folders
from pipeline.config.load import load
from pipeline.config.recipe import Recipe
from pipeline.core.cache import StageCache
from pipeline.core.errors import ConflictError, ExitCode, IncompatibleError
from pipeline.formats.spec import CardCompiler
from pipeline.machine import require_builder
from pipeline.outcome import failure_of
from pipeline.registry.package import mark_throwaway
from pipeline.registry.stores.folder import FolderRegistry
from pipeline.rehearse.shrink import on_random_weights, small_acceptance, small_settings, small_spec
from pipeline.sources.text.topics import PydocTopics

log = logging.getLogger(__name__)

Composed = Mapping[str, tuple[Recipe, Mapping[str, Any]]]
"""Compiler name -> the recipe composed with it, and its plain configuration."""
_WORDS = {"good": "done", "stopped": "as far as this machine goes", "failed": "FAILED"}


@dataclass(frozen=True)
class Rehearsed:
    """How far one format (name of the compiler) went.

    Attributes:
        state: `good`: all of it; `stopped`: everything that can be checked here; `failed`.
        reached: The last thing that was done.
        detail: The verdict, why it stopped, or the error.
    """

    format: str
    state: str
    reached: str
    detail: str
    exit_code: ExitCode = ExitCode.OK
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "exit_code": int(self.exit_code), "seconds": round(self.seconds, 2)}


def run_rehearsal(
    recipe: str,
    overrides: Sequence[str],
    *,
    full_size: bool,
    keep: Path | None,
    config_dir: Path | None,
) -> Answer:
    """Rehearse a recipe; exits with the code of the first format that failed.

    An override that chooses a compiler rehearses that one only; with `full_size` only the weights
    are random; `keep` is an empty folder for what is made, None throws it away.
    """
    started = time.perf_counter()
    composed = compose(recipe, overrides, config_folders(config_dir))
    for engine_format in composed:
        require_builder(engine_format)
    # What the registry logs is of a key and of packages that are thrown away.
    logging.getLogger("pipeline.registry").setLevel(logging.WARNING)
    with screen_logging(), _folder(keep) as folder:
        mark_throwaway(folder / "registry")
        done = [_rehearse(name, *one, folder, full_size) for name, one in composed.items()]
    seconds = time.perf_counter() - started
    code = next((result.exit_code for result in done if result.exit_code), ExitCode.OK)
    table = Table("format", "state", "reached", "s")
    for one in done:
        table.add_row(one.format, _WORDS[one.state], one.reached, f"{one.seconds:.0f}")
    details = [f"{one.format}: {one.detail}" for one in done if one.state != "good"]
    size = "full size" if full_size else "a tiny model of the same architecture"
    verdict = "good" if code is ExitCode.OK else "failed"
    summary = f"Rehearsal of {recipe} {verdict}: random weights, {size}; {seconds:.0f} s"
    return Answer(
        value={
            "recipe": recipe,
            "seconds": round(seconds, 2),
            "formats": [result.to_json() for result in done],
        },
        shown=[table, *details, summary, *([f"Kept in {keep}"] if keep is not None else [])],
        exit_code=code,
        message="\n".join([summary, *details]),
    )


def compose(recipe: str, overrides: Sequence[str], folders: ConfigFolders) -> Composed:
    """The recipe with each compiler it was written for (sizes, keys); its own compiler first."""
    job = load(recipe, overrides, folders=folders)
    composed: dict[str, tuple[Recipe, Mapping[str, Any]]] = {
        job.value.compiler.format: (job.value, job.config)
    }
    if any(override.split("=")[0] == "compiler" for override in overrides):
        return composed
    for name in folders.options("compiler"):
        other = load(recipe, [*overrides, f"compiler={name}"], folders=folders)
        if name not in composed and not other.faults:
            composed[name] = (other.value, other.config)
    return composed


@contextlib.contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="enginesmith-rehearsal-") as folder:
            yield Path(folder)
        return
    if keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise ConflictError(f"{keep} exists and is not empty; name a new folder")
    keep.mkdir(parents=True, exist_ok=True)
    yield keep


def _rehearse(
    name: str, recipe: Recipe, config: Mapping[str, Any], folder: Path, full_size: bool
) -> Rehearsed:
    log.info("Rehearsing compiler=%s", name)
    started = time.perf_counter()
    run_dir = folder / "runs" / name
    run_dir.mkdir(parents=True)
    try:
        done = _run(name, _rehearsed(recipe, folder, full_size), config, run_dir)
    except Exception as error:
        failure = failure_of(error)
        done = Rehearsed(name, "failed", "", failure.message, failure.exit_code)
    return dataclasses.replace(done, seconds=time.perf_counter() - started)


def _rehearsed(recipe: Recipe, folder: Path, full_size: bool) -> Recipe:
    shape, compiler = recipe.shape, recipe.compiler
    if not full_size:
        shape, compiler = small_spec(shape), small_settings(compiler)
    made: Recipe = on_random_weights(recipe, shape, folder / "weights")
    return dataclasses.replace(
        made,
        compiler=compiler,
        acceptance=small_acceptance(recipe.acceptance, PydocTopics(part="judge")),
        registry=FolderRegistry(path=folder / "registry"),
    )


def _run(name: str, recipe: Recipe, config: Mapping[str, Any], run_dir: Path) -> Rehearsed:
    """Build it; where the compiler cannot work here, do what comes before it."""
    folder, compiler = run_dir.parent.parent, recipe.compiler
    if isinstance(compiler, CardCompiler):
        try:
            compiler.check_machine(recipe.target)
        except IncompatibleError as error:
            reached = _converted(recipe, compiler, folder / "cache")
            reason = str(error).splitlines()[0]
            detail = f"{reason}; not run: {shlex.join(compiler.command)}"
            return Rehearsed(name, "stopped", reached, detail)
    # A key of its own, in CI too: a rehearsal proves nothing, and leaves nothing behind.
    environ = {"ENGINESMITH_CONFIG": str(folder / "config")}
    outcome = build(recipe, run_dir, config=config, cache_dir=folder / "cache", environ=environ)
    good = outcome.exit_code is ExitCode.OK
    state, code = ("good", ExitCode.OK) if good else ("failed", ExitCode.NOT_ACCEPTED)
    return Rehearsed(name, state, f"package {outcome.reference}", outcome.message, code)


def _converted(recipe: Recipe, compiler: CardCompiler, cache_dir: Path) -> str:
    """Fetch, quantize, convert, verify."""
    cache = StageCache(root=cache_dir)
    checkpoint = recipe.quantizer.quantize(recipe.source.fetch(), recipe.calibration, cache)
    size_bytes = sum(file.size_bytes for file in compiler.convert(checkpoint, cache).files)
    return f"{compiler.format} checkpoint, {size_bytes / 1e6:.1f} MB, every tensor checked"
