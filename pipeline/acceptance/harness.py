"""Benchmark tasks of EleutherAI's lm-evaluation-harness, put to a session.

The package `lm_eval` is optional (extra `eval`): it brings forty others. Its tasks mostly load
their data from the Hugging Face Hub; tasks of one's own come from a folder of YAML files.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from annotated_types import MinLen
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from pipeline.core.errors import Fault, IncompatibleError, PipelineError, RecipeError
from pipeline.core.settings import STRICT, Listed, PathField
from pipeline.core.values import Finding
from pipeline.runners.runner import Session


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HarnessSettings:
    """Which tasks, and what the engine may lose in them.

    Attributes:
        tasks: Names of tasks or groups, as `lm-eval ls tasks` lists them, or of `include_path`.
        include_path: Folder with tasks of one's own, as YAML files of that library.
        num_fewshot: Solved examples before each question; None for each task's own number.
        limit: Questions of each task, the first ones; None for all.
        apply_chat_template: Put each question to the model as a user's message.
        max_drop: What the engine may lose in each metric, in its own unit; None to report only. It
            must leave room for noise: of n questions, d of which the two answer differently,
            accuracy changes by chance with a standard deviation of about sqrt(d) / n.
    """

    tasks: Annotated[Listed[str], MinLen(1)]
    include_path: PathField | None = None
    num_fewshot: NonNegativeInt | None = None
    limit: PositiveInt | None = None
    apply_chat_template: bool = False
    max_drop: NonNegativeFloat | None = None


def check_harness(settings: HarnessSettings) -> None:
    """Find what would fail later.

    IncompatibleError if `lm_eval` is not installed; RecipeError if a task or the folder is missing.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise IncompatibleError(
            "acceptance.lm_eval.tasks needs the package lm_eval, which is not installed: "
            "pip install '.[eval]', or leave the tasks out"
        )
    folder = settings.include_path
    if folder is not None and not folder.is_dir():
        raise RecipeError([Fault("acceptance.lm_eval.include_path", f"{folder} is no folder")])
    manager = _manager(settings)
    unknown = [task for task in settings.tasks if not manager.match_tasks([task])]
    if unknown:
        message = f"no such task: {', '.join(unknown)}; lm-eval ls tasks lists all"
        raise RecipeError([Fault("acceptance.lm_eval.tasks", message)])


def run_harness(
    session: Session, tokenizer: Any, settings: HarnessSettings, *, context: int, seed: int
) -> dict[str, Any]:
    """Put the tasks to one session, the source or the engine, with the tokenizer of its folder.

    Requests longer than the `context` lose their start, which is counted. PipelineError if a task
    cannot be loaded or asks for what the session cannot do, or a metric is not finite.
    """
    import lm_eval

    from pipeline.acceptance.harness_model import SessionModel
    from pipeline.acceptance.quality import BOOTSTRAP_DRAWS
    from pipeline.model.hf import quiet

    # Read by lm_eval.api.metrics.bootstrap_stderr, 0.4.13: else that forks this process, whose
    # runtimes have threads.
    os.environ["DISABLE_MULTIPROC"] = "1"
    model = SessionModel(session, tokenizer, context)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        with quiet():
            found = lm_eval.simple_evaluate(
                model=model,
                tasks=list(settings.tasks),
                num_fewshot=settings.num_fewshot,
                limit=settings.limit,
                apply_chat_template=settings.apply_chat_template,
                task_manager=_manager(settings),
                log_samples=False,
                bootstrap_iters=BOOTSTRAP_DRAWS,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
    except (OSError, ValueError, KeyError) as error:  # what it raises for data that is not there
        raise PipelineError(
            f"lm_eval could not run {', '.join(settings.tasks)}: {type(error).__name__}: {error}"
        ) from error
    return {
        "version": lm_eval.__version__,
        "limit": settings.limit,
        "num_fewshot": settings.num_fewshot,
        "truncated": model.truncated,
        "tasks": {
            task: {
                "version": found["versions"].get(task),
                "samples": found["n-samples"].get(task, {}).get("effective"),
                "metrics": dict(_metrics(task, values, found["higher_is_better"].get(task, {}))),
            }
            for task, values in found["results"].items()
        },
    }


def _manager(settings: HarnessSettings) -> Any:
    from lm_eval.tasks import TaskManager

    folder = settings.include_path
    return TaskManager(include_path=None if folder is None else str(folder))


def _metrics(
    task: str, values: Mapping[str, Any], higher: Mapping[str, bool | None]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The library's `acc,none` and `acc_stderr,none`, put together as `acc`."""
    for key, value in values.items():
        name, _, answer_filter = key.partition(",")
        if not answer_filter or name.endswith("_stderr"):
            continue
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise PipelineError(f"lm_eval: {task} has {name} = {value!r}, wanted a finite number")
        spread = values.get(f"{name}_stderr,{answer_filter}")
        yield (
            name if answer_filter == "none" else f"{name} ({answer_filter})",
            {
                "value": float(value),
                # The library writes "N/A" for metrics whose error it does not know.
                "stderr": float(spread) if isinstance(spread, (int, float)) else None,
                "higher_is_better": higher.get(name),
            },
        )


def harness_findings(
    source: Mapping[str, Any], engine: Mapping[str, Any], max_drop: float | None
) -> Iterator[Finding]:
    """`regression` for each metric worse by more than `max_drop`, where better is known; pure."""
    for task, result in engine["tasks"].items() if max_drop is not None else ():
        for name, metric in result["metrics"].items():
            before = source["tasks"][task]["metrics"][name]["value"]
            higher = metric["higher_is_better"]
            drop = before - metric["value"] if higher else metric["value"] - before
            if higher is not None and not drop <= max_drop:
                yield Finding(
                    "regression",
                    f"lm_eval: {task}: {name} is {metric['value']:.4g}, the source has "
                    f"{before:.4g}: worse by {drop:.4g}, {max_drop:.4g} is allowed",
                )
