"""What `enginesmith race` does: check, make the artifact, hold the card, race, report."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pipeline.acceptance.race.request import TRTLLM, Request, compose, runner_of, workloads_of
from pipeline.acceptance.race.transformers_contender import TRANSFORMERS
from pipeline.acceptance.race.vllm_contenders import VLLM_PEERS
from pipeline.commands.answer import Answer
from pipeline.core.errors import ExitCode, IncompatibleError
from pipeline.runners.workload import Workload

if TYPE_CHECKING:
    from pipeline.acceptance.card import HeldCard
    from pipeline.acceptance.race.contenders import Contender
    from pipeline.acceptance.race.journal import Journal
    from pipeline.acceptance.race.prepare import Prepared
    from pipeline.config.recipe import Recipe
    from pipeline.runners.vllm.runner import VllmRunner

log = logging.getLogger(__name__)

_TOOLS = ("vllm", "torch", "transformers", "nvidia-modelopt", "flashinfer-python", "triton")


def run_race_command(request: Request) -> Answer:
    """Race, as far as the time allows.

    Returns:
        The report. It exits as OK when all asked pairs are complete; FAILED when one failed;
        TRANSIENT when time ran out, so that the same command with `--resume` goes on; NOT_ACCEPTED
        when all was measured and is worth nothing, as with a stranger's process on the card.

    Raises:
        RecipeError: The recipe or the command line is wrong.
        IncompatibleError: No GPU or no vLLM here; known before anything is downloaded.
        ConflictError: The folder holds another race.
        PreparationError: The artifact was not made.
    """
    started = time.monotonic()
    recipe = compose(request)
    workloads = workloads_of(request, recipe)
    runner = runner_of(recipe)
    if reason := runner.why_not_here(recipe.compiler.pinned_runtime):
        raise IncompatibleError(f"a race runs in vLLM on a GPU: {reason}")
    from pipeline.acceptance.card import disturbance, held_card
    from pipeline.acceptance.race.journal import open_journal, require_folder
    from pipeline.acceptance.race.prepare import on_random_weights, prepare
    from pipeline.build import plan_of
    from pipeline.commands.screen import screen_logging
    from pipeline.core.cache import cache_root
    from pipeline.machine import require_builder, require_room

    require_builder("checkpoint")
    require_folder(request.folder, resume=request.resume)
    if not request.resume:
        require_room(plan_of(recipe), cache_root())
    if request.random_weights:
        recipe = on_random_weights(recipe, cache_root())
    with screen_logging():
        with held_card() as held:
            if found := disturbance(held.before):
                log.warning("Before the race %s: this race is inconclusive", found)
            prepared = prepare(recipe, cache_root(), request.folder.parent)
            question = question_of(request, recipe, prepared, workloads, held.card)
            journal = open_journal(request.folder, question, resume=request.resume)
            timely = _race(request, recipe, prepared, workloads, runner, journal, held, started)
        assert held.after is not None
        journal.add(
            "end",
            after=held.after.to_json(),
            findings=[finding.to_json() for finding in held.findings()],
            in_time=timely,
        )
        return conclude(request, recipe, workloads, question, journal)


def question_of(
    request: Request,
    recipe: Recipe,
    prepared: Prepared,
    workloads: Sequence[Workload],
    card: str,
) -> dict[str, Any]:
    """What is raced: figures of another question are not comparable."""
    engine, weights = prepared.engine, prepared.weights
    return {
        "schema": 1,
        "recipe": recipe.name,
        "random_weights": request.random_weights,
        "gpu": card,
        "engine": {
            "digest": engine.digest,
            "variant": engine.variant,
            "limits": engine.limits.to_json(),
        },
        "weights": {"digest": weights.digest, "origin": weights.origin, "commit": weights.commit},
        "workloads": [{"name": load.name, **load.load} for load in workloads],
        "seed": recipe.acceptance.seed,
        "tools": tool_versions(),
    }


def contenders_of(
    peers: Sequence[str],
    recipe: Recipe,
    prepared: Prepared,
    workloads: Sequence[Workload],
    runner: VllmRunner,
) -> tuple[Contender, tuple[Contender, ...]]:
    """Ours, and the peers in the order asked."""
    from pipeline.acceptance.race.transformers_contender import (
        TransformersContender,
        transformers_memory_bytes,
    )
    from pipeline.acceptance.race.vllm_contenders import ours_in_vllm, vllm_peer
    from pipeline.runners.vllm.session import Timeouts

    times = Timeouts(load_s=runner.load_timeout_s, answer_s=runner.answer_timeout_s)
    engine, source, shape = prepared.engine, prepared.weights.dir, recipe.shape
    found: dict[str, Contender] = {
        name: vllm_peer(name, source, engine, shape, workloads, times) for name in VLLM_PEERS
    }
    found[TRANSFORMERS] = TransformersContender(
        weights_dir=source,
        memory_bytes=transformers_memory_bytes(source, shape, workloads),
        timeouts=times,
    )
    ours = ours_in_vllm(engine, shape, workloads, times)
    return ours, tuple(found[name] for name in peers if name in found)


def _race(
    request: Request,
    recipe: Recipe,
    prepared: Prepared,
    workloads: tuple[Workload, ...],
    runner: VllmRunner,
    journal: Journal,
    held: HeldCard,
    started: float,
) -> bool:
    """Tell the journal what is asked, and run it; False if the time ran out."""
    from pipeline.acceptance.race.rounds import Clock, RaceSettings, run_race

    ours, peers = contenders_of(request.peers, recipe, prepared, workloads, runner)
    settings = RaceSettings(
        workloads=workloads,
        rounds=request.rounds,
        seed=recipe.acceptance.seed,
        vocab_size=recipe.shape.vocab_size,
    )
    before = held.before
    total, used = before.memory_total_bytes, before.memory_used_bytes
    begin(journal, ours, peers, settings, before.to_json())
    return run_race(
        ours,
        peers,
        settings,
        journal,
        clock=Clock(limit_s=request.time_limit_s, started=started),
        free_bytes=None if total is None else total - (used or 0),
    )


def begin(
    journal: Journal,
    ours: Contender,
    peers: Sequence[Contender],
    settings: Any,
    before: Mapping[str, Any] | None,
) -> None:
    """The first event of a command."""
    journal.begin(
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        asked={peer.name: settings.rounds_with(peer) for peer in peers},
        contenders={
            one.name: {
                "label": one.label,
                "arguments": list(one.arguments),
                "memory_bytes": one.memory_bytes,
            }
            for one in (ours, *peers)
        },
        tools=tool_versions(),
        before=before,
    )


def conclude(
    request: Request,
    recipe: Recipe,
    workloads: Sequence[Workload],
    question: Mapping[str, Any],
    journal: Journal,
) -> Answer:
    """Write the report; the answer of this command."""
    from pipeline.acceptance.race.page import write_report
    from pipeline.acceptance.race.report import Context, report_of
    from pipeline.acceptance.race.table import said, shown

    context = Context(
        target=recipe.target.id,
        target_card=recipe.target.card,
        roofline=roofline_on(recipe, str(question["gpu"])),
        not_raced=not_raced(request.peers),
        next_command=request.next_command(),
    )
    report = report_of(question, journal.events, context)
    files = write_report(report, journal.folder)
    return Answer(
        value=report,
        shown=shown(report, files),
        exit_code=exit_code(report, request.peers),
        message="\n".join(said(report)),
    )


def exit_code(report: Mapping[str, Any], asked: Sequence[str]) -> ExitCode:
    """As `run_race_command` says; pairs that only earlier commands asked for do not count."""
    states = {pair["peer"]: pair["state"] for pair in report["pairs"]}
    own = [states.get(peer, "failed") for peer in asked]
    if "failed" in own:
        return ExitCode.FAILED
    if any(state != "complete" for state in own):
        return ExitCode.TRANSIENT
    if report["verdict"] in {"inconclusive", "anomalous"}:
        return ExitCode.NOT_ACCEPTED
    return ExitCode.OK


def not_raced(asked: Sequence[str]) -> dict[str, str]:
    """Contenders that cannot take part, and why."""
    import importlib.util

    if importlib.util.find_spec("tensorrt_llm") is None:
        why = "TensorRT-LLM is not installed here"
    else:
        why = "a race has no contender for TensorRT-LLM engines yet"
    return {TRTLLM: f"{why}; enginesmith accept measures such an engine on its card"}


def roofline_on(recipe: Recipe, card: str) -> Any:
    """Our artifact's roofline on the card that was raced on; None for a card we do not know."""
    from pipeline.build import plan_of
    from pipeline.core.targets import target_of_card
    from pipeline.plan.ceilings import roofline

    target = recipe.target if recipe.target.card == card else target_of_card(card)
    if target is None:
        return None
    plan = plan_of(dataclasses.replace(recipe, target=target))
    return roofline(plan.request, plan.sizes)


def tool_versions() -> dict[str, str]:
    """Versions of what runs and what made the artifact; the interpreter's too."""
    import contextlib
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in _TOOLS:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
