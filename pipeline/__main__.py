"""Build a recipe: compose, check everything, build, tell the outcome.

    enginesmith build smollm2 compiler.max_batch_size=4
    python -m pipeline --config-dir recipes --config-name smollm2 compiler.max_batch_size=4
    make engine MODEL=smollm2 ARGS="compiler.max_batch_size=4"

are one code path: `run`. Past this file there are typed objects only.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.answer import (
    Answer,
    answer_of,
    failure,
    screen_logging,
    show_error,
    tell,
)
from pipeline.config.compose import INFO, config_folders, show_info
from pipeline.config.load import Job, load
from pipeline.core.errors import AccessError, ExitCode, RecipeError
from pipeline.outcome import (
    Outcome,
    append_github_output,
    failure_of,
    open_run,
    refusal_of,
    write_verdict,
)
from pipeline.run_log import file_logging

log = logging.getLogger("pipeline.run")

DEFAULT_REGISTRY = Path("artifacts")


@dataclass(frozen=True, kw_only=True)
class Request:
    """A command line; `config_dir` has recipes of the user's own."""

    recipe: str
    overrides: tuple[str, ...] = ()
    rebuild: bool = False
    config_dir: Path | None = None


_STOPS: list[int] = []
"""Signals that asked this run to stop."""


def run(request: Request) -> ExitCode:
    """As `answer`; tells people, too."""
    done = answer(request)
    tell(done)
    return done.exit_code


def answer(request: Request) -> Answer:
    """Check everything, build, and record the outcome."""
    try:
        with _terminable(), screen_logging():
            return _run(request)
    except KeyboardInterrupt as error:
        return failure(error)


def _run(request: Request) -> Answer:
    try:
        job = load(request.recipe, request.overrides, folders=config_folders(request.config_dir))
    except RecipeError as error:
        job = Job(recipe=request.recipe, config={}, typed=None, faults=error.faults)
    section = job.config.get("registry")
    registry = section if isinstance(section, dict) else {}
    folder = DEFAULT_REGISTRY  # where also the runs of other registries stay
    if isinstance(path := registry.get("path"), str) and path and "://" not in path:
        folder = Path(path)
    try:
        run_dir = open_run(folder)
    except (AccessError, OSError) as error:
        outcome = refusal_of(job.faults) if job.faults else failure_of(error)
        document = outcome.to_json(request.recipe, request.overrides)
        append_github_output(document)
        return answer_of(outcome, document)
    outcome = _attempt(job, run_dir, request.rebuild)
    document = outcome.to_json(request.recipe, request.overrides)
    # Programs first: a closed terminal must not cost the verdict.
    write_verdict(run_dir, document)
    append_github_output(document)
    return answer_of(outcome, document, _generate_command(outcome, registry.get("url") or folder))


def _attempt(job: Job, run_dir: Path, rebuild: bool) -> Outcome:
    """Run one job to its end, whatever that is."""
    started = time.perf_counter()
    try:
        run_dir.mkdir(exist_ok=True)
        with file_logging(run_dir / "build.log"):
            log.debug("%s", job)
            if job.faults:
                outcome = refusal_of(job.faults)
            else:
                from pipeline import build

                outcome = build.build(job.value, run_dir, config=job.config, rebuild=rebuild)
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        # A native library that is stopped while it loads turns Ctrl-C into an ImportError.
        outcome = failure_of(KeyboardInterrupt() if _STOPS else error)
    return replace(outcome, seconds=time.perf_counter() - started)


def _generate_command(outcome: Outcome, registry: str | Path) -> str:
    """The command line that talks to the package, as it works in this shell."""
    installed = shutil.which("enginesmith") is not None
    command = ["enginesmith"] if installed else [sys.executable, "-m", "pipeline.cli"]
    command += ["generate", str(outcome.reference)]
    if registry != DEFAULT_REGISTRY:
        command += ["--registry", str(registry)]
    return shlex.join(command) + ' "Why is the sky blue?"'


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the block like Ctrl-C, so that it cleans up behind itself; note both."""
    _STOPS.clear()
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return

    def stop(number: int, frame: object) -> None:
        _STOPS.append(number)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _show(request: Request, info: str | None) -> ExitCode:
    """Print how a recipe is composed, as `info` or whole; what Hydra's own flags do."""
    try:
        folders = config_folders(request.config_dir)
        if info:
            show_info(info, request.recipe, request.overrides, folders)
        else:
            job = load(request.recipe, request.overrides, folders=folders)
            if job.faults:
                raise RecipeError(job.faults)
            print(job.text)
    except RecipeError as error:
        show_error(refusal_of(error.faults).message)
        return error.exit_code
    return ExitCode.OK


def main(arguments: Sequence[str] | None = None) -> ExitCode:
    """`python -m pipeline`: Hydra's own flags, as far as they mean something here."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m pipeline", description="Build a recipe.")
    parser.add_argument("--config-dir", "-cd", type=Path, help="folder with recipes of your own")
    parser.add_argument("--config-name", "-cn", required=True, help="the recipe")
    parser.add_argument("--cfg", "-c", choices=["job"], help="print the composed recipe, and stop")
    parser.add_argument("--info", "-i", choices=INFO, help="print how Hydra composed it, and stop")
    parser.add_argument("--rebuild", action="store_true", help="build what is already published")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    given = parser.parse_intermixed_args(arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # for the reasons in `cli`
    os.umask(os.umask(0o077) | 0o002)
    request = Request(
        recipe=given.config_name,
        overrides=tuple(given.overrides),
        rebuild=given.rebuild,
        config_dir=given.config_dir,
    )
    return _show(request, given.info) if given.cfg or given.info else run(request)


if __name__ == "__main__":
    sys.exit(main())
