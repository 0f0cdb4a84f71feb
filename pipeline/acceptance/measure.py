"""Runs an engine and measures it: on this machine's CPU, or on a card that is held for it.

On the card that an engine is for, the recipe's targets are measured and judged. On another card the
same figures are taken and nothing is demanded of them: what Hopper reaches says nothing about Ada.
"""

from __future__ import annotations

import logging
import os
import platform
from dataclasses import asdict, replace
from typing import Any

from pipeline.acceptance.acceptance import Acceptance, Subject, tool_versions
from pipeline.acceptance.answers import Comparison, Measured, Source, compare_cut
from pipeline.acceptance.bandwidth import measure_bandwidth
from pipeline.acceptance.card import HeldCard, held_card
from pipeline.acceptance.judge import ceiling_share, judge, judge_physics
from pipeline.acceptance.speed import (
    ENGINE,
    Waves,
    measure_speed,
    rate_findings,
    spread_findings,
    summarize,
)
from pipeline.acceptance.sustained import judge_sustained, run_sustained, sustained_json
from pipeline.core.cache import StageCache
from pipeline.core.values import Report, Verdict
from pipeline.machine import available_bytes
from pipeline.model.hf import load_tokenizer
from pipeline.plan import Plan
from pipeline.plan.ceilings import roofline
from pipeline.quant.spec import KV_CACHE_DTYPES
from pipeline.runners.runner import Runner, Session, SourceRunner
from pipeline.runners.workload import Workload, eos_ids
from pipeline.sources.text.corpus import TextCorpus

log = logging.getLogger(__name__)


def measure(acceptance: Acceptance, subject: Subject, cache: StageCache) -> tuple[Report, Verdict]:
    """Run what can be run here and judge it.

    CorruptError for logits that are not finite; RecipeError if the text is too short.
    """
    engine, runner, target = subject.engine, subject.runner, subject.plan.request.target
    checks, not_run = dict(engine.checks), list[str]()
    held, measured = None, Measured()
    reason = runner.why_not(engine)
    if reason is None and runner.device == "cuda":
        with held_card() as held:
            measured = _run(acceptance, subject, cache, held)
    elif reason := reason or acceptance.too_much(subject.plan.request.shape, available_bytes()):
        log.warning("Not running the whole model: %s", reason)
        not_run.append(f"whole model: {reason}")
        if engine.cpu_graph_dir is not None and subject.checkpoint_dir is not None:
            checks["two_layer_cut"] = compare_cut(subject.checkpoint_dir, engine.cpu_graph_dir)
    else:
        measured = _run(acceptance, subject, cache, None)
    on_target = held is not None and held.card == target.card
    if not on_target:
        not_run.insert(0, f"{target.card}: no such card here; speed and numerics on it")
    kv_cache = KV_CACHE_DTYPES[engine.limits.kv_cache_dtype]
    if held is None and kv_cache.quant_algo:
        not_run.insert(1, f"{kv_cache.title} KV cache: what runs here keeps the cache in float32")
    report = Report(
        digest=subject.package_digest,
        card=target.card,
        conditions=conditions_json(runner, acceptance.text, held),
        not_run=[*not_run, *measured.not_run],
        checks=checks,
        **measured.parts,
    )
    findings = (*measured.findings, *(held.findings() if held else ()))
    ran = reason is None
    return report, judge(report, acceptance, ran=ran, on_target=on_target, more=findings)


def conditions_json(runner: Runner, text: TextCorpus, held: HeldCard | None) -> dict[str, Any]:
    """Where and with what it was measured."""
    told: dict[str, Any] = {
        "device": "cpu" if held is None else held.before.gpu,
        "machine": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "runner": runner.name,
        "text": text.origin,
        "tools": tool_versions(),
    }
    if held is not None and held.after is not None:
        told |= {"card": held.card, "before": asdict(held.before), "after": asdict(held.after)}
    return told


def _run(asked: Acceptance, subject: Subject, cache: StageCache, held: HeldCard | None) -> Measured:
    """Quality and chat; on a card also speed and sustained load. One model at a time.

    No speed on a CPU: that says nothing about the engine (`enginesmith race --cpu`).
    """
    runner = subject.runner
    # Before anything of ours takes memory of the card.
    bandwidth = measure_bandwidth() if held else None
    if bandwidth is not None:
        log.info("The card copies %.0f GB/s", bandwidth / 1e9)
    source = _source(asked, subject, cache, on_card=held is not None)
    answers = Comparison(asked, subject, source, cache)
    if held is None:
        with runner.open(subject.engine) as session:
            return answers.compare(session)
    on_target = held.card == subject.plan.request.target.card
    workloads = _workloads(asked, subject.plan, demanded=on_target)
    with runner.open(subject.engine) as session:
        found = answers.compare(session)
        speed = tuple(_time(asked, subject, load, session) for load in workloads)
        _sustain(asked, subject, found, session, workloads)
    found.parts["speed"] = speed
    found.findings += spread_findings(speed, asked.max_spread)
    found.findings += rate_findings(speed, demanded=on_target)
    if on_target:
        line = roofline(subject.plan.request, subject.plan.sizes)
        found.parts["physics"] = {
            "bandwidth_bytes_per_s": bandwidth,
            "shares": [ceiling_share(entry, line, bandwidth) for entry in speed],
        }
        found.findings += judge_physics(speed, line, bandwidth)
    return found


def _workloads(asked: Acceptance, plan: Plan, *, demanded: bool) -> tuple[Workload, ...]:
    """The targets, a wanted share of the ceiling as the rate that it is; else without demands."""
    ceilings = {planned.name: planned.ceiling for planned in plan.workloads}
    return tuple(
        load.with_rate(ceilings[load.name])
        if demanded
        else replace(load, min_output_tokens_per_s=None, min_share_of_ceiling=None)
        for load in asked.targets
    )


def _source(asked: Acceptance, subject: Subject, cache: StageCache, *, on_card: bool) -> Source:
    """The source in float32 on the CPU; in bfloat16 on the card where that is too much."""
    from pipeline.runners.transformers import open_source

    weights, runner = subject.weights, subject.runner
    if on_card and isinstance(runner, SourceRunner):
        reason = asked.too_much(subject.plan.request.shape, available_bytes())
        if reason:
            log.info("The source runs in bfloat16 on the card; in float32 on the CPU it %s", reason)
            context = subject.engine.limits.max_seq_len
            return Source(
                weights, cache, lambda: runner.open_source(weights.dir, context), runner.name
            )
    return Source(weights, cache, lambda: open_source(weights.dir), "transformers-float32")


def _time(
    asked: Acceptance, subject: Subject, workload: Workload, session: Session
) -> dict[str, Any]:
    waves = _waves(asked, subject, workload)
    samples = measure_speed(workload, {ENGINE: session}, waves, asked.repeats)
    entry = summarize(workload, samples[ENGINE])
    log.info("%s: %.1f tok/s", workload.name, entry["output_tokens_per_s"])
    return entry


def _waves(asked: Acceptance, subject: Subject, workload: Workload) -> Waves:
    """What each run of a workload gives the session; its file of prompts must fit."""
    tokenizer, ends = None, frozenset[int]()
    if workload.prompts_file or not workload.ignore_eos:
        tokenizer = load_tokenizer(subject.engine.dir)
        ends = eos_ids(tokenizer)
    vocab_size = subject.plan.request.shape.vocab_size
    prompts = workload.request_prompts(vocab_size, asked.seed, tokenizer)
    return workload.waves(prompts, asked.seed, ends)


def _sustain(
    asked: Acceptance,
    subject: Subject,
    found: Measured,
    session: Session,
    workloads: tuple[Workload, ...],
) -> None:
    asked_run, limits = asked.sustained, asked.sustained.limits
    if not asked_run.minutes or not workloads:
        return
    workload = max(workloads, key=lambda load: load.batch)
    log.info("Sustained run: %s for %.1f minutes", workload.name, asked_run.minutes)
    waves = _waves(asked, subject, workload)
    samples = run_sustained(session, workload.osl, waves[0], asked_run.minutes)
    found.parts["sustained"] = sustained_json(samples, limits, workload.name)
    found.findings += judge_sustained(samples, limits)
