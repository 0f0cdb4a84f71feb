"""The sustained run's judge: synthetic leaks and slowdowns, noise, and the exact thresholds."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace

from pipeline.acceptance.sustained import (
    Sample,
    SustainedLimits,
    judge_sustained,
    sustained_figures,
    sustained_json,
)

MIB = 2**20
LIMITS = SustainedLimits(
    max_throughput_drop=0.05,
    max_memory_growth_bytes=20 * MIB,
    warm_up_s=30.0,
    window_s=60.0,
    min_duration_s=120.0,
)


def run(
    rate: Callable[[float], float] = lambda t_s: 1000.0,
    memory: Callable[[float], float] | None = lambda t_s: 8e9,
    *,
    seconds: int = 1200,
    every_s: int = 5,
) -> list[Sample]:
    return [
        Sample(
            t_s=float(t_s),
            output_tokens_per_s=rate(t_s),
            memory_bytes=None if memory is None else round(memory(t_s)),
        )
        for t_s in range(0, seconds + 1, every_s)
    ]


def kinds(samples: list[Sample], limits: SustainedLimits = LIMITS) -> list[str]:
    return [finding.kind for finding in judge_sustained(samples, limits)]


def test_healthy_noisy_run_has_no_findings() -> None:
    for seed in range(20):
        noise = random.Random(seed)
        samples = run(
            lambda t_s, noise=noise: 1000.0 * noise.gauss(1.0, 0.04),  # type: ignore[misc]
            lambda t_s, noise=noise: 8e9 + noise.uniform(-50, 50) * MIB,  # type: ignore[misc]
        )
        assert kinds(samples) == [], seed


def test_throttling_of_15_percent_in_20_minutes_is_rejected_in_spite_of_noise() -> None:
    for seed in range(20):
        noise = random.Random(seed)
        samples = run(
            lambda t_s, noise=noise: (  # type: ignore[misc]
                1000.0 * (1 - 0.15 * t_s / 1200) * noise.gauss(1.0, 0.04)
            )
        )
        assert kinds(samples) == ["rejected"], seed


def test_slow_leak_below_noise_of_single_samples_is_rejected() -> None:
    for seed in range(20):
        noise = random.Random(seed)
        samples = run(
            memory=lambda t_s, noise=noise: (  # type: ignore[misc]
                8e9 + 60 * MIB * t_s / 1200 + noise.uniform(-30, 30) * MIB
            )
        )
        (finding,) = judge_sustained(samples, LIMITS)
        assert finding.kind == "rejected"
        assert "memory grew" in finding.message


def test_leak_in_steps_is_rejected() -> None:
    assert kinds(run(memory=lambda t_s: 8e9 + 20 * MIB * (t_s // 200))) == ["rejected"]


def test_one_late_allocation_is_no_leak() -> None:
    assert kinds(run(memory=lambda t_s: 8e9 + (500 * MIB if t_s > 1000 else 0))) == []


def test_a_few_stalled_seconds_are_no_slowdown() -> None:
    assert kinds(run(lambda t_s: 0.0 if 1160 <= t_s <= 1170 else 1000.0)) == []


def test_slow_and_growing_warm_up_is_not_judged() -> None:
    samples = run(lambda t_s: 5000.0 if t_s < 30 else 1000.0, lambda t_s: 1e9 if t_s < 30 else 8e9)
    assert kinds(samples) == []
    # The same peak one sample later and longer would be a drop.
    assert kinds(run(lambda t_s: 5000.0 if t_s < 90 else 1000.0)) == ["rejected"]


def test_faster_and_shrinking_run_has_no_findings() -> None:
    assert kinds(run(lambda t_s: 900.0 + t_s / 10, lambda t_s: 8e9 - MIB * t_s)) == []


def test_drop_is_judged_at_the_exact_threshold() -> None:
    limits = replace(LIMITS, max_throughput_drop=0.25)
    assert kinds(run(lambda t_s: 1000.0 if t_s < 600 else 750.0), limits) == []
    below = math.nextafter(750.0, 0.0)
    assert kinds(run(lambda t_s: 1000.0 if t_s < 600 else below), limits) == ["rejected"]


def test_growth_is_judged_at_the_exact_threshold() -> None:
    grown = 1024 * (1200 - 30)
    samples = run(memory=lambda t_s: 1024 * t_s)
    figures = sustained_figures(samples, LIMITS)
    assert not isinstance(figures, str)
    assert figures.memory_growth_bytes == grown
    assert kinds(samples, replace(LIMITS, max_memory_growth_bytes=grown)) == []
    assert kinds(samples, replace(LIMITS, max_memory_growth_bytes=grown - 1)) == ["rejected"]


def test_duration_is_judged_at_the_exact_threshold() -> None:
    assert kinds(run(seconds=150)) == []
    assert kinds(run(seconds=145)) == ["inconclusive"]


def test_too_short_a_run_is_inconclusive_even_if_it_is_slow_and_leaks() -> None:
    samples = run(lambda t_s: 1000.0 - 5 * t_s, lambda t_s: 1e9 + MIB * t_s, seconds=100)
    assert kinds(samples) == ["inconclusive"]
    assert kinds([]) == ["inconclusive"]
    assert kinds(samples[:1]) == ["inconclusive"]


def test_window_samples_are_judged_at_the_exact_threshold() -> None:
    samples = run(every_s=15)  # 5 in a window of 60 s, both ends included
    assert kinds(samples) == []
    assert kinds(samples, replace(LIMITS, min_window_samples=6)) == ["inconclusive"]


def test_run_that_generates_nothing_is_inconclusive_never_a_pass() -> None:
    assert kinds(run(lambda t_s: 0.0)) == ["inconclusive"]


def test_memory_that_was_not_read_throughout_is_a_note() -> None:
    assert kinds(run(memory=None)) == ["note"]
    samples = run()
    samples[100] = replace(samples[100], memory_bytes=None)
    assert kinds(samples) == ["note"]


def test_long_run_is_thinned_and_still_judged() -> None:
    samples = run(memory=lambda t_s: 8e9 + 10_000 * t_s, seconds=20_000, every_s=1)
    (finding,) = judge_sustained(samples, LIMITS)
    assert finding.kind == "rejected"


def test_json_has_figures_only_of_a_run_that_is_enough_of_one() -> None:
    assert sustained_json(run(), LIMITS, "b8")["figures"]["throughput_drop"] == 0.0
    short = sustained_json(run(seconds=60), LIMITS, "b8")
    assert short["figures"] is None
    assert len(short["samples"]) == 13
    assert short["samples"][0] == {
        "t_s": 0.0, "output_tokens_per_s": 1000.0, "memory_bytes": 8_000_000_000,
    }  # fmt: skip
