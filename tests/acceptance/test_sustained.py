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
    sustained_json,
)
from pipeline.core.errors import PipelineError
from pipeline.model.hf import load_model
from pipeline.runners.runner import Generation
from pipeline.runners.transformers import TransformersSession
from pipeline.runners.workload import BatchOptions, Lengths, Workload
from tests.tiny import VOCAB_SIZE, tiny_model

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


@pytest.mark.parametrize(
    ("fall", "leak", "expected"), [(0, 0, []), (0.15, 0, ["rejected"]), (0, 60, ["rejected"])]
)
def test_throttling_and_a_slow_leak_are_told_from_noise(
    fall: float, leak: float, expected: list[str]
) -> None:
    for seed in range(20):
        noise = random.Random(seed)
        samples = run(
            lambda t_s, noise=noise: 1000.0 * (1 - fall * t_s / 1200) * noise.gauss(1.0, 0.04),  # type: ignore[misc]
            lambda t_s, noise=noise: 8e9 + (leak * t_s / 1200 + noise.uniform(-30, 30)) * MIB,  # type: ignore[misc]
        )
        assert kinds(samples) == expected, seed


def test_each_limit_is_kept_at_the_exact_threshold() -> None:
    quarter = replace(LIMITS, max_throughput_drop=0.25)
    below = math.nextafter(750.0, 0.0)
    assert kinds(run(lambda t_s: 1000.0 if t_s < 600 else 750.0), quarter) == []
    assert kinds(run(lambda t_s: 1000.0 if t_s < 600 else below), quarter) == ["rejected"]
    grown, leaking = 1024 * (1200 - 30), run(memory=lambda t_s: 1024 * t_s)
    assert kinds(leaking, replace(LIMITS, max_memory_growth_bytes=grown)) == []
    assert kinds(leaking, replace(LIMITS, max_memory_growth_bytes=grown - 1)) == ["rejected"]
    assert kinds(run(seconds=150)) == []
    assert kinds(run(lambda t_s: 1000.0 - t_s, seconds=145)) == ["inconclusive"]
    assert kinds([]) == ["inconclusive"]
    fewest = run(every_s=15)  # 5 in a window of 60 s, both ends included
    assert kinds(fewest) == []
    assert kinds(fewest, replace(LIMITS, min_window_samples=6)) == ["inconclusive"]


def test_one_late_allocation_is_no_leak() -> None:
    assert kinds(run(memory=lambda t_s: 8e9 + (500 * MIB if t_s > 1000 else 0))) == []


def test_slow_and_growing_warm_up_is_not_judged() -> None:
    samples = run(lambda t_s: 5000.0 if t_s < 30 else 1000.0, lambda t_s: 1e9 if t_s < 30 else 8e9)
    assert kinds(samples) == []
    # The same peak one sample later and longer would be a drop.
    assert kinds(run(lambda t_s: 5000.0 if t_s < 90 else 1000.0)) == ["rejected"]


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
