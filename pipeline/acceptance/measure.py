"""Runs an engine and measures it: on this machine's CPU, or on a card that is held for it.

On the card that an engine is for, the recipe's targets are measured and judged. On another card the
same figures are taken and nothing is demanded of them: what Hopper reaches says nothing about Ada.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.acceptance.bandwidth import measure_bandwidth
from pipeline.acceptance.card import HeldCard
from pipeline.acceptance.chat_judge import chat_findings
from pipeline.acceptance.chat_probe import Answer, ChatProbe
from pipeline.acceptance.harness import harness_findings, run_harness
from pipeline.acceptance.physics import MeasuredRate, PhysicsLimits, ceiling_share, judge_physics
from pipeline.acceptance.quality import SourceFigures, engine_figures, summarize_quality
from pipeline.acceptance.source import Source
from pipeline.acceptance.speed import measure_speed, spread_findings, summarize
from pipeline.acceptance.sustained import judge_sustained, sustained_json
from pipeline.acceptance.sustained_run import run_sustained
from pipeline.acceptance.workload import Workload
from pipeline.cache import StageCache
from pipeline.hf import load_tokenizer
from pipeline.plan import Plan
from pipeline.plan.ceilings import roofline
from pipeline.runners.session import BenchRunner, Runner, Session, SourceRunner
from pipeline.stages import Engine, Finding, Weights
from pipeline.text.windows import pack_windows

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.acceptance.acceptance import Acceptance

log = logging.getLogger(__name__)

SIMULATIONS = frozenset({"transformers"})
"""Runners that simulate the engine: their answers tell about it, their speed does not."""
PHYSICS = PhysicsLimits(tolerance=0.05, min_share=0.25, l2_cache_bytes=72_000_000)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is measured.

    Attributes:
        engine: The engine.
        package_digest: The sealed package that holds it.
        weights: The source model that it is compared with.
        checkpoint_dir: The unified checkpoint that it was made from; None where only the package
            is at hand.
        plan: What follows from its recipe: shape, card, ceilings.
        runner: What executes it here.
    """

    engine: Engine
    package_digest: str
    weights: Weights
    checkpoint_dir: Path | None
    plan: Plan
    runner: Runner


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a run gave, as parts of the report.

    Attributes:
        quality: Perplexities, KL, agreement, the sample.
        speed: One entry per workload.
        chat: The chat probe.
        lm_eval: Task -> metric -> value.
        sustained: The sustained run.
        physics: Shares of the card's ceilings.
        findings: What the parts that judge themselves found.
        not_run: What was left out, and why.
    """

    quality: Mapping[str, Any]
    speed: tuple[Mapping[str, Any], ...] = ()
    chat: Mapping[str, Any] = field(default_factory=dict)
    lm_eval: Mapping[str, Any] = field(default_factory=dict)
    sustained: Mapping[str, Any] = field(default_factory=dict)
    physics: Mapping[str, Any] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    not_run: tuple[str, ...] = ()


def measure_on_cpu(asked: Acceptance, subject: Subject, cache: StageCache) -> Measured:
    """Quality of an engine's twin or simulation, and speed beside Transformers on the same CPU.

    No sustained run: it is there for a card that throttles and a runtime that leaks its memory.
    """
    with _source(asked, subject, cache, on_card=False) as source:
        answers = _Answers.of(asked, subject, source)
        with subject.runner.open(subject.engine) as session:
            found = answers.compare(session)
            if subject.runner.name in SIMULATIONS:
                why = f"speed: runner {subject.runner.name} only simulates the engine"
                return replace(found, not_run=(why,) if asked.cpu_workloads else ())
            contenders: dict[str, Session] = {"engine": session, "transformers": source.session}
            speed = tuple(_timed(asked, subject, load, contenders) for load in asked.cpu_workloads)
            return _with_speed(asked, found, speed)


def measure_on_card(
    asked: Acceptance, subject: Subject, cache: StageCache, held: HeldCard
) -> Measured:
    """Quality, chat, speed and sustained load on a card; each model in a process of its own."""
    on_target = held.card == subject.plan.request.target.card
    workloads = demanded(asked, subject.plan) if on_target else undemanded(asked)
    bandwidth = measure_bandwidth()
    if bandwidth is not None:
        log.info("The card copies %.0f GB/s", bandwidth / 1e9)
    with _source(asked, subject, cache, on_card=True) as source:
        answers = _Answers.of(asked, subject, source)
    with subject.runner.open(subject.engine) as session:
        found = answers.compare(session)
        if not isinstance(subject.runner, BenchRunner):
            speed = tuple(_timed(asked, subject, load, {"engine": session}) for load in workloads)
            found = _with_speed(asked, found, speed)
        found = _with_sustained(asked, subject, found, session, workloads)
    if isinstance(subject.runner, BenchRunner):
        found = _with_speed(asked, found, tuple(_benched(asked, subject, workloads)))
    if not on_target:
        return found
    request = subject.plan.request
    line = roofline(request.shape, subject.plan.sizes, request.target)
    rates = [
        MeasuredRate(
            name=entry["workload"],
            batch=entry["batch"],
            isl=round(entry.get("mean_isl", entry["isl"])),
            osl=entry["osl"],
            output_tokens_per_s=entry["output_tokens_per_s"],
        )
        for entry in found.speed
    ]
    return replace(
        found,
        physics={
            "bandwidth_bytes_per_s": bandwidth,
            "shares": [ceiling_share(rate, line, bandwidth).to_json() for rate in rates],
        },
        findings=(*found.findings, *judge_physics(rates, line, PHYSICS, bandwidth)),
    )


def demanded(asked: Acceptance, plan: Plan) -> tuple[Workload, ...]:
    """The targets, a wanted share of the ceiling as the rate that it is on this card."""
    ceilings = {planned.name: planned.ceiling for planned in plan.workloads}
    return tuple(load.with_rate(ceilings[load.name]) for load in asked.targets)


def undemanded(asked: Acceptance) -> tuple[Workload, ...]:
    """The targets as plain workloads."""
    return tuple(
        replace(load, min_output_tokens_per_s=None, min_share_of_ceiling=None)
        for load in asked.targets
    )


def _source(asked: Acceptance, subject: Subject, cache: StageCache, *, on_card: bool) -> Source:
    """The source in float32 on the CPU; in bfloat16 on the card where that is too much."""
    from pipeline.runners.transformers import open_source

    weights, runner = subject.weights, subject.runner
    if on_card and isinstance(runner, SourceRunner):
        reason = asked.too_much(subject.plan.request.shape, available_bytes(), speed=False)
        if reason:
            log.info("The source runs in bfloat16 on the card; in float32 on the CPU it %s", reason)
            context = subject.engine.limits.max_seq_len
            return Source(
                weights, cache, lambda: runner.open_source(weights.dir, context), runner.name
            )
    return Source(weights, cache, lambda: open_source(weights.dir), "transformers-float32")


@dataclass(frozen=True, kw_only=True)
class _Answers:
    """What the source says, ready for the comparison."""

    asked: Acceptance
    subject: Subject
    windows: NDArray[np.int64]
    source: SourceFigures
    chat: ChatProbe | None
    source_chat: tuple[Answer, ...]
    source_tasks: Mapping[str, Any] | None

    @classmethod
    def of(cls, asked: Acceptance, subject: Subject, source: Source) -> _Answers:
        tokenizer = load_tokenizer(subject.engine.dir)
        windows = pack_windows(
            asked.text.documents(),
            tokenizer,
            seq_len=asked.window_tokens,
            count=asked.windows,
            seed=None,
        )
        chat = None
        if asked.chat is not None:
            chat = ChatProbe.prepare(
                load_tokenizer(subject.weights.dir),
                tokenizer,
                asked.chat,
                context=subject.engine.limits.max_seq_len,
            )
        return cls(
            asked=asked,
            subject=subject,
            windows=windows,
            source=source.figures(windows),
            chat=chat,
            source_chat=source.chat(chat) if chat else (),
            source_tasks=_tasks(asked, subject, source.session) if asked.lm_eval else None,
        )

    def compare(self, session: Session) -> Measured:
        """The engine against the source."""
        asked = self.asked
        tokenizer = load_tokenizer(self.subject.engine.dir)
        figures = engine_figures(lambda tokens: session.logits(tokens), self.windows, self.source)
        quality = summarize_quality(self.source.nll, figures, asked.seed)
        quality["sample"] = _sample(session, tokenizer, asked.sample_prompt, asked.sample_tokens)
        log.info("Sample: %s", quality["sample"]["answer"].replace("\n", " "))
        found = Measured(quality=quality)
        if self.chat is not None:
            log.info("The engine answers %d chat prompts", len(self.chat.asked))
            chat = self.chat.ask_engine(session, self.source_chat)
            found = replace(found, chat=chat, findings=chat_findings(chat))
        if asked.lm_eval is None or self.source_tasks is None:
            return found
        tasks = _tasks(asked, self.subject, session)
        worse = harness_findings(self.source_tasks, tasks, asked.lm_eval.max_drop)
        return replace(
            found,
            lm_eval={"source": self.source_tasks, "engine": tasks},
            findings=(*found.findings, *worse),
        )


def _tasks(asked: Acceptance, subject: Subject, session: Session) -> dict[str, Any]:
    """Results of the lm-eval harness for one session."""
    assert asked.lm_eval is not None
    log.info("lm-eval: %s", ", ".join(asked.lm_eval.tasks))
    return run_harness(
        session,
        load_tokenizer(subject.engine.dir),
        asked.lm_eval,
        context=subject.engine.limits.max_seq_len,
        seed=asked.seed,
    )


def _sample(session: Session, tokenizer: Any, prompt: str, max_tokens: int) -> dict[str, str]:
    """The prompt and its greedy answer."""
    from pipeline.runners.chat import chat_prompt, eos_ids

    tokens = list(session.stream(chat_prompt(tokenizer, prompt), max_tokens, eos_ids(tokenizer)))
    return {"prompt": prompt, "answer": tokenizer.decode(tokens)}


def _timed(
    asked: Acceptance, subject: Subject, workload: Workload, contenders: Mapping[str, Session]
) -> dict[str, Any]:
    samples = measure_speed(
        workload,
        dict(contenders),
        vocab_size=subject.plan.request.shape.vocab_size,
        repeats=asked.repeats,
        seed=asked.seed,
        tokenizer=load_tokenizer(subject.engine.dir) if workload.prompts_file else None,
    )
    entry = summarize(workload, samples)
    beside = entry.get("transformers")
    log.info(
        "%s: %.1f tok/s%s",
        workload.name,
        entry["output_tokens_per_s"],
        f", Transformers {beside['output_tokens_per_s']:.1f}" if beside else "",
    )
    return entry


def _benched(
    asked: Acceptance, subject: Subject, workloads: tuple[Workload, ...]
) -> Iterator[dict[str, Any]]:
    """Speed by the runtime's own tool, which needs the card for itself."""
    assert isinstance(subject.runner, BenchRunner)
    folder = Path(tempfile.mkdtemp(prefix="enginesmith-bench-"))
    for workload in workloads:
        yield subject.runner.bench(
            subject.engine,
            subject.checkpoint_dir or subject.weights.dir,
            workload,
            repeats=asked.repeats,
            seed=asked.seed,
            log_path=folder / f"{workload.name}.log",
        )


def available_bytes() -> int:
    """Memory that is free on this machine."""
    import psutil

    return int(psutil.virtual_memory().available)


def _with_speed(
    asked: Acceptance, found: Measured, speed: tuple[Mapping[str, Any], ...]
) -> Measured:
    return replace(
        found, speed=speed, findings=(*found.findings, *spread_findings(speed, asked.max_spread))
    )


def _with_sustained(
    asked: Acceptance,
    subject: Subject,
    found: Measured,
    session: Session,
    workloads: tuple[Workload, ...],
) -> Measured:
    workload = asked.sustained.chosen(workloads) if asked.sustained.minutes else None
    if workload is None:
        return found
    log.info("Sustained run: %s for %.1f minutes", workload.name, asked.sustained.minutes)
    samples = run_sustained(
        session,
        workload,
        asked.sustained,
        vocab_size=subject.plan.request.shape.vocab_size,
        seed=asked.seed,
    )
    limits = asked.sustained.limits
    return replace(
        found,
        sustained=sustained_json(samples, limits, workload.name),
        findings=(*found.findings, *judge_sustained(samples, limits)),
    )
