"""`enginesmith rehearse`: a recipe composed with every compiler, and how far each went."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.commands.answer import Answer
from pipeline.commands.screen import screen_logging
from pipeline.config.folders import ConfigFolders, config_folders
from pipeline.config.load import load
from pipeline.config.recipe import Recipe
from pipeline.core.errors import ConflictError, ExitCode
from pipeline.machine import require_builder
from pipeline.outcome import worst

if TYPE_CHECKING:
    from rich.table import Table

    from pipeline.rehearse.rehearsal import Rehearsed

_WORDS = {"good": "done", "stopped": "as far as this machine goes", "failed": "FAILED"}


def run_rehearsal(
    recipe: str,
    overrides: Sequence[str],
    *,
    full_size: bool,
    keep: Path | None,
    config_dir: Path | None,
) -> Answer:
    """Rehearse a recipe; exits with the worst exit code of its formats.

    Args:
        recipe: Its name.
        overrides: In Hydra's grammar; one that chooses a compiler rehearses that one only.
        full_size: Keep the real shape.
        keep: Folder for what is made; None throws it away.
        config_dir: Folder with the user's recipes.

    Raises:
        RecipeError: The recipe is wrong.
        IncompatibleError: Packages that building needs are not installed.
        ConflictError: `keep` exists and is not empty.
    """
    started = time.perf_counter()
    composed = compose(recipe, overrides, config_folders(config_dir))
    for engine_format in composed:
        require_builder(engine_format)
    from pipeline.rehearse.rehearsal import rehearse

    with screen_logging(), _folder(keep) as folder:
        done = rehearse(composed, folder, full_size=full_size)
    seconds = time.perf_counter() - started
    code = worst(result.exit_code for result in done)
    details = [f"{result.format}: {result.detail}" for result in done if result.state != "good"]
    size = "full size" if full_size else "a tiny model of the same architecture"
    verdict = "good" if code is ExitCode.OK else "failed"
    summary = f"Rehearsal of {recipe} {verdict}: random weights, {size}; {seconds:.0f} s"
    return Answer(
        value={
            "recipe": recipe,
            "seconds": round(seconds, 2),
            "formats": [result.to_json() for result in done],
        },
        shown=[_table(done), *details, summary, *([f"Kept in {keep}"] if keep is not None else [])],
        exit_code=code,
        message="\n".join([summary, *details]),
    )


def compose(
    recipe: str, overrides: Sequence[str], folders: ConfigFolders
) -> dict[str, tuple[Recipe, Mapping[str, Any]]]:
    """The recipe with each compiler, by the compiler's name; its own compiler first.

    A compiler that the recipe was not written for (no sizes, wrong keys) is left out, its own is
    not.

    Raises:
        RecipeError: The recipe itself is wrong, or there is none.
    """
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
    """An empty folder; removed afterwards unless it is to be kept."""
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="enginesmith-rehearsal-") as folder:
            yield Path(folder)
        return
    if keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise ConflictError(f"{keep} exists and is not empty; name a new folder")
    keep.mkdir(parents=True, exist_ok=True)
    yield keep


def _table(done: Sequence[Rehearsed]) -> Table:
    from rich.table import Table

    table = Table("format", "state", "reached", "s")
    for result in done:
        table.add_row(result.format, _WORDS[result.state], result.reached, f"{result.seconds:.0f}")
    return table
