"""An engine and a peer that take turns: ratios within rounds, so that drift hits both alike.

What drifts (clocks, heat, the host's other work) hits both runs of a round alike, so the ratio is
taken within each round, and the median over rounds is the result. Its interval is the percentile
bootstrap of that median: rounds are drawn with replacement, the ratio of a round stays whole.
Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from pipeline.acceptance.speed import ENGINE, measure_speed, summarize
from pipeline.acceptance.speed_sample import SpeedSample
from pipeline.core.errors import PipelineError
from pipeline.runners.session import Session
from pipeline.runners.workload import Workload

log = logging.getLogger(__name__)

LEVEL = 0.95
DRAWS = 10_000
"""Draws of the bootstrap: the ends of the interval repeat to less than its width over a hundred."""
MIN_ROUNDS = 3
"""With fewer rounds there is no interval. With three it is their whole range: a median of three
draws is the smallest of them in 26 % of all cases."""
_SEED = 20_251_125


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A model in a runtime that an engine is compared with.

    Attributes:
        name: Short name.
        label: What it is, for people.
        open: Loads it beside the engine; leaving the context frees it.
        max_rounds: Most rounds with it, where it is slow.
    """

    name: str
    label: str
    open: Callable[[], AbstractContextManager[Session]]
    max_rounds: int | None = None


def measure_pairs(
    engine: Session,
    peers: Sequence[Peer],
    workloads: Sequence[Workload],
    *,
    rounds: int,
    vocab_size: int,
    seed: int,
) -> tuple[tuple[Mapping[str, Any], ...], tuple[str, ...]]:
    """Measure an engine with each peer beside it, one peer after the other.

    Loads never overlap a round: while it loads, vLLM picks kernels by timing them (Inductor's
    `benchmark_combo_kernel`, FlashInfer's autotuning: config/compilation.py and config/kernel.py of
    vLLM 0.24.0), and what runs beside it would change its choice for good.

    Args:
        engine: Stays loaded.
        peers: What it is compared with.
        workloads: What is run.
        rounds: Timed rounds of each pair at each workload.
        vocab_size: Token ids are below it.
        seed: Of synthetic prompts.

    Returns:
        One entry of the report's `speed` for each workload that at least one pair ran; its `peers`
        has, by name, the peer's label, figures and `ratio_of`. And what was not run, and why.
    """
    runs: dict[str, list[SpeedSample]] = {load.name: [] for load in workloads}
    beside: dict[str, dict[str, Any]] = {load.name: {} for load in workloads}
    not_run = []
    for peer in peers:
        try:
            with peer.open() as session:
                log.info("%s is loaded", peer.label)
                for load in workloads:
                    waves = load.waves(load.request_prompts(vocab_size, seed), seed)
                    pair = {ENGINE: engine, peer.name: session}
                    turns = min(rounds, peer.max_rounds or rounds)
                    samples = measure_speed(load, pair, waves, turns)
                    ours, theirs = samples[ENGINE], samples[peer.name]
                    figures = {**summarize(load, theirs), "ratio": ratio_of(ours, theirs)}
                    ratio = figures["ratio"]["median"]
                    log.info("%s, %s: the engine is %.2f x as fast", peer.label, load.name, ratio)
                    runs[load.name] += ours
                    beside[load.name][peer.name] = {"label": peer.label, **figures}
        except PipelineError as error:
            log.warning("%s: %s", peer.label, error)
            not_run.append(f"{peer.label}: {error}")
    entries = tuple(
        {**summarize(load, runs[load.name]), "peers": beside[load.name]}
        for load in workloads
        if runs[load.name]
    )
    return entries, tuple(not_run)


def ratio_of(ours: Sequence[SpeedSample], theirs: Sequence[SpeedSample]) -> dict[str, Any]:
    """Output tokens per second, ours over theirs, by round.

    Returns:
        `median`, `low` and `high` of the 95 % interval (None with fewer than `MIN_ROUNDS`),
        `level`, `rounds`.
    """
    ratios = [
        mine.output_tokens_per_s / other.output_tokens_per_s
        for mine, other in zip(ours, theirs, strict=True)
    ]
    low, high = median_interval(ratios)
    return {
        "median": round(statistics.median(ratios), 5),
        "low": None if low is None else round(low, 5),
        "high": None if high is None else round(high, 5),
        "level": LEVEL,
        "rounds": len(ratios),
    }


def median_interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Ends of the 95 % percentile bootstrap interval of the median; the same for the same values.

    Returns:
        None and None with fewer than `MIN_ROUNDS` values.
    """
    import numpy as np

    if len(values) < MIN_ROUNDS:
        return None, None
    rng = np.random.default_rng(_SEED)
    drawn = rng.choice(np.asarray(values, np.float64), (DRAWS, len(values)))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(np.median(drawn, axis=1), [tail, 1 - tail])
    return float(low), float(high)
