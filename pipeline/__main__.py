"""Build recipes: compose, check everything, build, tell the outcome.

    enginesmith build smollm2 compiler.max_batch_size=4
    python -m pipeline --config-dir recipes --config-name smollm2 compiler.max_batch_size=4
    make engine MODEL=smollm2 ARGS="compiler.max_batch_size=4"

are one code path: `run`. Past this file there are typed objects only.
"""

from __future__ import annotations

import contextlib
import logging
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.commands.answer import Answer, answer_of, failure, tell
from pipeline.commands.screen import file_logging, screen_logging, show_error
from pipeline.config.compose import INFO, show_info
from pipeline.config.folders import config_folders
from pipeline.config.load import Job, Loaded, config_text, load
from pipeline.core.errors import ExitCode, RecipeError
from pipeline.outcome import (
    Outcome,
    append_github_output,
    failure_of,
    jobs_table,
    open_run,
    refused,
    worst,
    write_verdict,
)

log = logging.getLogger("pipeline.run")

DEFAULT_REGISTRY = Path("artifacts")


@dataclass(frozen=True, kw_only=True)
class Request:
    """A command line.

    Attributes:
        recipes: A recipe; with `multirun` several, with commas between.
        overrides: In Hydra's grammar.
        multirun: Sweeps are allowed; each combination is a job.
        rebuild: Build although a package with the same build key is published.
        config_dir: Folder with the user's recipes, searched first.
    """

    recipes: str
    overrides: tuple[str, ...] = ()
    multirun: bool = False
    rebuild: bool = False
    config_dir: Path | None = None


_STOPS: list[int] = []
"""Signals that asked this run to stop."""

Work = Callable[[Job, Path, bool], Outcome]
"""Builds one good job in its run folder; the flag is `Request.rebuild`."""


def build_job(job: Job, run_dir: Path, rebuild: bool) -> Outcome:
    """Hand the recipe of a job to the pipeline."""
    from pipeline.build import BuildOptions, build

    return build(job.value, run_dir, BuildOptions(rebuild=rebuild, config=job.config))


def run(request: Request, work: Work = build_job) -> ExitCode:
    """As `answer`; tells people, too."""
    done = answer(request, work)
    tell(done)
    return done.exit_code


def answer(request: Request, work: Work = build_job) -> Answer:
    """Check all jobs, run the good ones, and record the outcome.

    A job that fails or misses its target does not stop the others; Ctrl-C and SIGTERM do.
    """
    try:
        with _terminable(), screen_logging():
            return _run(request, work)
    except KeyboardInterrupt as error:
        return failure(error)


def _run(request: Request, work: Work) -> Answer:
    try:
        folders = config_folders(request.config_dir)
        loaded = load(
            request.recipes, request.overrides, folders=folders, multirun=request.multirun
        )
    except RecipeError as error:
        loaded = Loaded(jobs=(), faults=error.faults)
    try:
        run_dir = open_run(_registry_dir(loaded))
    except OSError as error:
        return _nowhere_to_write(loaded, error)
    if loaded.faults or not request.multirun:
        return _run_single(request, loaded, run_dir, work)
    return _run_jobs(request, loaded.jobs, run_dir, work)


def _registry_dir(loaded: Loaded) -> Path:
    """The folder registry of the first job that names one; runs of other registries stay local."""
    for job in loaded.jobs:
        registry = job.config.get("registry")
        path = registry.get("path") if isinstance(registry, dict) else None
        if isinstance(path, str) and path and "://" not in path:
            return Path(path)
    return DEFAULT_REGISTRY


def _registry_url(loaded: Loaded) -> str:
    """What `--registry` takes to find the packages of a job."""
    for job in loaded.jobs:
        registry = job.config.get("registry")
        if isinstance(registry, dict) and isinstance(url := registry.get("url"), str):
            return url
    return str(_registry_dir(loaded))


def _nowhere_to_write(loaded: Loaded, error: OSError) -> Answer:
    """Report that there can be no run folder; faults in the recipe count more."""
    faults = loaded.all_faults
    outcome = refused(faults) if faults else failure_of(error)
    if not faults and outcome.exit_code is ExitCode.FAILED:
        message = f"cannot write {error.filename}: {error.strerror}; set registry.path=FOLDER"
        outcome = replace(outcome, message=message)
    document = outcome.to_json("", ())
    append_github_output(document)
    return answer_of(outcome, document)


def _run_single(request: Request, loaded: Loaded, run_dir: Path, work: Work) -> Answer:
    """One job, or a command line that is wrong for all jobs."""
    if loaded.faults:
        outcome = refused(loaded.all_faults)
    else:
        outcome = _attempt(loaded.jobs[0], run_dir, request, work)
    document = outcome.to_json(request.recipes, request.overrides)
    _record(run_dir, document)
    return answer_of(outcome, document, _generate_command(outcome, _registry_url(loaded)))


def _run_jobs(request: Request, jobs: Sequence[Job], run_dir: Path, work: Work) -> Answer:
    """Every job in turn, each in a folder of its own; a table at the end."""
    for job in jobs:
        if job.faults:
            log.warning("%s cannot be built: %s", _label(job), "; ".join(map(str, job.faults)))
    rows: list[tuple[str, Sequence[str], Outcome]] = []
    stopped = False
    for number, job in enumerate(jobs, start=1):
        if stopped:
            outcome = Outcome(exit_code=ExitCode.INTERRUPTED, message="not started")
        else:
            if not job.faults:
                log.info("Job %d of %d: %s", number, len(jobs), _label(job))
            job_dir = run_dir / f"{number:0{len(str(len(jobs)))}d}"
            outcome = _attempt(job, job_dir, request, work)
            if outcome.verdict is None and not job.faults:
                show_error(outcome.message)
            stopped = outcome.exit_code is ExitCode.INTERRUPTED
            write_verdict(job_dir, outcome.to_json(job.recipe, job.swept))
        rows.append((job.recipe, job.swept, outcome))
    code = worst(outcome.exit_code for _, _, outcome in rows)
    good = sum(outcome.exit_code is ExitCode.OK for _, _, outcome in rows)
    whole = Outcome(
        exit_code=code,
        message=f"{good} of {len(rows)} jobs are good",
        seconds=sum(outcome.seconds for _, _, outcome in rows),
    )
    document = whole.to_json(request.recipes, request.overrides)
    document["jobs"] = [outcome.to_json(recipe, swept) for recipe, swept, outcome in rows]
    _record(run_dir, document)
    return Answer(value=document, shown=[jobs_table(rows)], exit_code=code, message=whole.message)


def _record(run_dir: Path, document: Mapping[str, Any]) -> None:
    """Tell programs, before people: a closed terminal must not cost the verdict."""
    write_verdict(run_dir, document)
    append_github_output(document)


def _label(job: Job) -> str:
    return " ".join([job.recipe, *job.swept])


def _attempt(job: Job, run_dir: Path, request: Request, work: Work) -> Outcome:
    """Run one job to its end, whatever that is."""
    started = time.perf_counter()
    try:
        run_dir.mkdir(exist_ok=True)
        with file_logging(run_dir / "build.log"):
            log.debug("%s", job)
            outcome = refused(job.faults) if job.faults else work(job, run_dir, request.rebuild)
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        # A native library that is stopped while it loads turns Ctrl-C into an ImportError.
        outcome = failure_of(KeyboardInterrupt() if _STOPS else error)
    return replace(outcome, seconds=time.perf_counter() - started)


def _generate_command(outcome: Outcome, registry: str) -> str:
    """The command line that talks to the package, as it works in this shell."""
    script = Path(sys.executable).parent / "enginesmith"
    if shutil.which("enginesmith"):
        command = ["enginesmith"]
    elif script.is_file():
        here = script.is_relative_to(Path.cwd())
        command = [str(script.relative_to(Path.cwd()) if here else script)]
    else:
        command = [sys.executable, "-m", "pipeline.cli"]
    command += ["generate", str(outcome.reference)]
    if registry != str(DEFAULT_REGISTRY):
        command += ["--registry", registry]
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


def _show(
    recipe: str, overrides: Sequence[str], config_dir: Path | None, info: str | None
) -> ExitCode:
    """Print how a recipe is composed, as `info` or whole; what Hydra's own flags do."""
    try:
        folders = config_folders(config_dir)
        if info:
            show_info(info, recipe, overrides, folders)
        else:
            print(config_text(load(recipe, overrides, folders=folders).one_job().config))
    except RecipeError as error:
        show_error(refused(error.faults).message)
        return error.exit_code
    return ExitCode.OK


def main(arguments: Sequence[str] | None = None) -> ExitCode:
    """`python -m pipeline`: Hydra's own flags, as far as they mean something here."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m pipeline", description="Build recipes.")
    parser.add_argument("--config-dir", "-cd", type=Path, help="folder with recipes of your own")
    parser.add_argument("--config-name", "-cn", required=True, help="the recipe")
    parser.add_argument("--multirun", "-m", action="store_true", help="several recipes, sweeps")
    parser.add_argument("--cfg", "-c", choices=["job"], help="print the composed recipe, and stop")
    parser.add_argument("--info", "-i", choices=INFO, help="print how Hydra composed it, and stop")
    parser.add_argument("--rebuild", action="store_true", help="build what is already published")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    given = parser.parse_intermixed_args(arguments)
    if given.cfg or given.info:
        return _show(given.config_name, given.overrides, given.config_dir, given.info)
    return run(
        Request(
            recipes=given.config_name,
            overrides=tuple(given.overrides),
            multirun=given.multirun,
            rebuild=given.rebuild,
            config_dir=given.config_dir,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
