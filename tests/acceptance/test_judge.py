"""The judge at its exact thresholds, and the figures that it judges."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from pipeline.acceptance.judge import QualityLimits, judge
from pipeline.acceptance.quality import (
    EngineFigures,
    SourceFigures,
    engine_figures,
    log_softmax,
    summarize_quality,
)
from pipeline.acceptance.report import junit
from pipeline.acceptance.speed import SpeedSample, measure_speed, summarize
from pipeline.acceptance.workload import Workload
from pipeline.errors import CorruptError
from pipeline.runners.session import Generation
from pipeline.stages import Report, Verdict

LIMITS = QualityLimits(max_perplexity_increase=0.01, max_mean_kl_nats=0.05, min_top1_agreement=0.9)


def report(
    *,
    change: float = 0.0,
    high: float = 0.0,
    kl: float = 0.01,
    top1: float = 0.95,
    rate: float = 10.0,
    ratio: float = 2.0,
) -> Report:
    return Report(
        digest="d",
        card="card",
        conditions={},
        speed=[
            {
                "workload": "b1",
                "output_tokens_per_s": rate,
                "min_output_tokens_per_s": 10.0,
                "ratio_to_transformers": ratio,
                "min_ratio_to_transformers": 2.0,
            }
        ],
        quality={
            "perplexity_change": {"value": change, "low": change - 1.0, "high": high},
            "mean_kl_nats": {"value": kl},
            "top1_agreement": {"value": top1},
        },
        not_run=["the card"],
        checks={},
    )


def verdict(ran: bool = True, on_target: bool = False, **figures: float) -> Verdict:
    return judge(report(**figures), LIMITS, ran=ran, on_target=on_target)


def test_exact_thresholds_pass() -> None:
    assert verdict(change=0.01, kl=0.05, top1=0.9).name == "checked"


@pytest.mark.parametrize(
    ("figures", "name"),
    [
        ({"change": math.nextafter(0.01, 1)}, "regression"),
        ({"kl": math.nextafter(0.05, 1)}, "regression"),
        ({"top1": math.nextafter(0.9, 0)}, "regression"),
        ({"rate": math.nextafter(10.0, 0)}, "rejected"),
        ({"ratio": math.nextafter(2.0, 0)}, "rejected"),
        ({"rate": 1.0, "kl": 1.0}, "regression"),
        ({"change": -0.05, "high": -0.02, "kl": 1.0}, "anomalous"),
    ],
)
def test_one_step_beyond_fails_and_the_worst_finding_names_the_verdict(
    figures: dict[str, float], name: str
) -> None:
    assert verdict(**figures).name == name
    assert not verdict(**figures).passed


def test_better_than_the_source_within_the_noise_is_not_anomalous() -> None:
    assert verdict(change=-0.05, high=-0.01).name == "checked"


def test_verdict_says_where_it_ran() -> None:
    assert verdict(on_target=True).name == "accepted"
    assert verdict(ran=False).name == "compiled"
    assert "not run: the card" in [finding.message for finding in verdict().findings]


def test_identical_logits_have_no_divergence() -> None:
    rng = np.random.default_rng(0)
    windows = rng.integers(0, 11, (3, 6))
    logits = rng.normal(size=(3, 6, 11)).astype(np.float32)
    by_window = {tuple(window): values for window, values in zip(windows, logits, strict=True)}
    logprobs = log_softmax(logits[:, :-1])
    nll = -np.take_along_axis(logprobs, windows[:, 1:, None], -1)[..., 0]
    source = SourceFigures(
        logprobs=logprobs.astype(np.float16), nll=nll, top1=logprobs.argmax(-1).astype(np.int32)
    )
    figures = engine_figures(lambda tokens: by_window[tuple(tokens)], windows, source)
    summary = summarize_quality(nll, figures, seed=0)
    assert summary["tokens"] == 15
    assert summary["top1_agreement"]["value"] == 1.0
    assert summary["mean_kl_nats"]["value"] == pytest.approx(0.0, abs=1e-4)  # float16 log-probs
    assert summary["perplexity_change"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert summary["source_perplexity"]["value"] == pytest.approx(math.exp(nll.mean()), rel=1e-5)


def test_kl_is_the_textbook_sum() -> None:
    p, q = np.array([0.7, 0.2, 0.1], np.float32), np.array([0.5, 0.3, 0.2], np.float32)
    source = SourceFigures(
        logprobs=np.log(p).astype(np.float16)[None, None],
        nll=-np.log(p[:1])[None],
        top1=np.zeros((1, 1), np.int32),
    )
    logits = np.stack([np.log(q), np.log(q)])
    figures = engine_figures(lambda tokens: logits, np.array([[0, 0]]), source)
    assert figures.kl[0, 0] == pytest.approx(float((p * np.log(p / q)).sum()), abs=1e-3)
    assert figures.nll[0, 0] == pytest.approx(-math.log(0.5), abs=1e-5)


def test_logits_that_are_not_finite_are_never_judged() -> None:
    source = SourceFigures(
        logprobs=np.zeros((1, 1, 3), np.float16),
        nll=np.zeros((1, 1), np.float32),
        top1=np.zeros((1, 1), np.int32),
    )
    nan = np.full((2, 3), np.nan, np.float32)
    with pytest.raises(CorruptError, match="not finite in window 0"):
        engine_figures(lambda tokens: nan, np.array([[0, 0]]), source)


def test_interval_holds_the_value_and_shrinks_with_more_windows() -> None:
    rng = np.random.default_rng(1)

    def width(windows: int) -> float:
        engine = rng.normal(3.0, 0.3, (windows, 8)).astype(np.float32)
        figures = EngineFigures(nll=engine, kl=engine, agrees=engine > 3)
        interval = summarize_quality(engine, figures, 0)["engine_perplexity"]
        assert interval["low"] < interval["value"] < interval["high"]
        return float(interval["high"] - interval["low"])

    assert width(200) < width(10)


class Recorded:
    """A session whose generations take a known time; notes who was called."""

    def __init__(self, name: str, calls: list[str], total_s: float) -> None:
        self._name, self._calls, self._total_s = name, calls, total_s

    def generate(self, prompts: Any, osl: int) -> Generation:
        self._calls.append(self._name)
        slow = 50.0 if self._calls.count(self._name) == 1 else 1.0  # the warm-up
        tokens = np.zeros((len(prompts), osl), np.int64)
        return Generation(tokens=tokens, ttft_s=0.5 * slow, total_s=self._total_s * slow)


def test_speed_alternates_drops_the_warm_up_and_gives_the_ratio() -> None:
    calls: list[str] = []
    workload = Workload(name="b2", batch=2, isl=3, osl=5)
    contenders: Any = {
        "engine": Recorded("engine", calls, 2.5),
        "transformers": Recorded("transformers", calls, 5.0),
    }
    samples = measure_speed(workload, contenders, vocab_size=9, repeats=2, seed=0)
    assert calls == ["engine", "transformers"] * 3
    entry = summarize(workload, samples)
    assert entry["output_tokens_per_s"] == 2 * 5 / 2.5
    assert entry["ttft_ms"] == 500.0
    assert entry["itl_ms"] == (2.5 - 0.5) / 4 * 1e3
    assert entry["ratio_to_transformers"] == 2.0
    assert len(entry["samples"]) == 2


def test_one_token_has_no_gap() -> None:
    generation = Generation(tokens=np.zeros((1, 1), np.int64), ttft_s=1.0, total_s=1.0)
    assert SpeedSample.of(generation).itl_ms == 0.0


def test_prompts_repeat_and_stay_in_the_vocabulary() -> None:
    workload = Workload(name="x", batch=4, isl=50, osl=1)
    prompts = workload.prompts(17, seed=3)
    assert prompts.shape == (4, 50)
    assert 0 <= prompts.min() <= prompts.max() < 17
    np.testing.assert_array_equal(prompts, workload.prompts(17, seed=3))


def test_junit_has_a_case_per_workload_and_names_what_was_not_run() -> None:
    document = report(rate=1.0).to_json(verdict(rate=1.0))
    xml = junit(document).decode()
    assert 'tests="3" failures="1" skipped="1"' in xml
    assert 'name="speed.b1"><failure message="rejected: b1: 1.0 tok/s' in xml
