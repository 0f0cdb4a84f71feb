"""The sustained run's judge: synthetic leaks and slowdowns, noise, and the exact thresholds."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.acceptance.sustained import (
    Sample,
    SustainedLimits,
    judge_sustained,
    run_sustained,
    sustained_figures,
    sustained_json,
)
from pipeline.core.errors import PipelineError, RecipeError
from pipeline.model.hf import load_model
from pipeline.runners.onnxruntime import graph_session
from pipeline.runners.session import BatchOptions, CacheClearing, Generation
from pipeline.runners.transformers import TransformersSession
from pipeline.runners.workload import Lengths, Workload
from tests.formats.decoder.decoders import open_graph, write_graph
from tests.tiny import VOCAB_SIZE, tiny_model

MIB = 2**20
SHORT = SustainedLimits(
    max_throughput_drop=0.05, max_memory_growth_bytes=20 * 2**20, warm_up_s=10.0, window_s=20.0,
    min_duration_s=40.0,
)  # fmt: skip
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


def test_one_late_allocation_is_no_leak() -> None:
    assert kinds(run(memory=lambda t_s: 8e9 + (500 * MIB if t_s > 1000 else 0))) == []


def test_slow_and_growing_warm_up_is_not_judged() -> None:
    samples = run(lambda t_s: 5000.0 if t_s < 30 else 1000.0, lambda t_s: 1e9 if t_s < 30 else 8e9)
    assert kinds(samples) == []
    # The same peak one sample later and longer would be a drop.
    assert kinds(run(lambda t_s: 5000.0 if t_s < 90 else 1000.0)) == ["rejected"]


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
    assert figures["memory_growth_bytes"] == grown
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


def test_memory_that_was_not_read_throughout_is_a_note() -> None:
    assert kinds(run(memory=None)) == ["note"]
    samples = run()
    samples[100] = replace(samples[100], memory_bytes=None)
    assert kinds(samples) == ["note"]


def test_json_has_figures_only_of_a_run_that_is_enough_of_one() -> None:
    assert sustained_json(run(), LIMITS, "b8")["figures"]["throughput_drop"] == 0.0
    short = sustained_json(run(seconds=60), LIMITS, "b8")
    assert short["figures"] is None
    assert len(short["samples"]) == 13
    assert short["samples"][0] == {
        "t_s": 0.0, "output_tokens_per_s": 1000.0, "memory_bytes": 8_000_000_000,
    }  # fmt: skip


class Watched(TransformersSession):
    """A real session that notes what it does, in order."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.done: list[str] = []

    def generate(self, prompts: Any, osl: int, options: BatchOptions | None = None) -> Generation:
        self.done.append(f"generate {len(prompts)}")
        return super().generate(prompts, osl, options)

    def clear_cache(self) -> None:
        self.done.append("clear")
        super().clear_cache()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def session(model_dir: Path) -> Watched:
    return Watched(load_model(model_dir, "float32"))


def repeated(session: Any, **changes: Any) -> list[Sample]:
    """A run whose clock goes on by a second each time that it is read."""
    load = Workload(name="b2", batch=2, isl=8, osl=6, requests=4, osl_distribution=Lengths(min=2))
    seconds = itertools.count()
    (wave, *_) = load.waves(load.request_prompts(VOCAB_SIZE, 0), 0)
    return run_sustained(session, load.osl, wave, 0.1, clock=lambda: next(seconds), **changes)


def test_first_wave_is_repeated_and_only_real_tokens_count(session: Watched) -> None:
    load = Workload(name="b2", batch=2, isl=8, osl=6, requests=4, osl_distribution=Lengths(min=2))
    samples = repeated(session)
    made = sum(load.output_lengths(0)[:2])
    assert made < 12
    # Read at the start and at the end of each batch: one second each.
    assert [sample.output_tokens_per_s for sample in samples] == [float(made)] * 3
    assert session.done == ["generate 2"] * 4  # one before the clock starts


def test_cache_is_cleared_after_each_batch_only_where_asked(session: Watched) -> None:
    assert isinstance(session, CacheClearing)
    samples = repeated(session, clear=True)
    assert len(samples) == 3
    assert session.done == ["generate 2", *["generate 2", "clear"] * 3]


def test_session_without_a_cache_to_clear_is_refused(model_dir: Path, tmp_path: Path) -> None:
    twin = graph_session(open_graph(write_graph(model_dir, tmp_path, context=32)))
    assert not isinstance(twin, CacheClearing)
    with pytest.raises(RecipeError, match=r"acceptance\.sustained\.clear_cache"):
        repeated(twin, clear=True)


def test_session_that_gives_too_few_tokens_is_not_run_for_minutes(session: Watched) -> None:
    class Short(Watched):
        def generate(
            self, prompts: Any, osl: int, options: BatchOptions | None = None
        ) -> Generation:
            return super().generate(prompts, osl, BatchOptions(osl_each=(2,) * len(prompts)))

    short = Short(session._model)
    with pytest.raises(PipelineError, match="its speed cannot be measured"):
        repeated(short)
    assert short.done == ["generate 2"]


def series(rate: float, memory: int, growth: int, count: int = 60) -> list[Sample]:
    return [
        Sample(t_s=float(t), output_tokens_per_s=rate if t >= 10 else 1.0,
               memory_bytes=memory + growth * t)
        for t in range(1, count)
    ]  # fmt: skip


def test_report_has_both_runs_and_what_clearing_changed() -> None:
    leaking, cleared = series(1000.0, 8 * 2**30, 2**20), series(900.0, 7 * 2**30, 0)
    document = sustained_json(leaking, SHORT, "b2", cleared)
    other = document["cache_cleared"]
    assert other["effect"]["throughput_change"] == pytest.approx(-0.1)
    middle = 8 * 2**30 + 2**20 * (10 + 59) / 2
    assert other["effect"]["memory_change_bytes"] == pytest.approx(7 * 2**30 - middle, rel=1e-6)
    assert other["figures"]["memory_growth_bytes"] == 0.0
    assert document["figures"]["memory_growth_bytes"] == pytest.approx(49 * 2**20)
    assert len(other["samples"]) == 59
    # The run without clearing is the one that is judged.
    assert [finding.kind for finding in judge_sustained(leaking, SHORT)] == ["rejected"]
    assert "cache_cleared" not in sustained_json(leaking, SHORT, "b2")
