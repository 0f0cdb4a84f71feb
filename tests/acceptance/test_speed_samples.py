"""Runs that cannot be are refused; requests, the card and the spread are in the figures."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from pipeline.acceptance import speed
from pipeline.acceptance.card import Reading, Samples
from pipeline.acceptance.speed import SpeedSample, spread_findings, summarize
from pipeline.core.errors import PipelineError
from pipeline.runners.runner import Generation, RequestTiming
from pipeline.runners.workload import BatchOptions, Workload
from tests.acceptance.questions import Stub, speed_of

LOAD = Workload(name="b2", batch=2, isl=5, osl=4)
PROMPTS = [[1, 2, 3, 4, 5]] * 2


def timing(ttft_ms: float, decode_ms: float) -> RequestTiming:
    return RequestTiming(
        ttft_ms=ttft_ms, request_latency_ms=ttft_ms + decode_ms, itl_ms=decode_ms / 3
    )


@dataclass
class Answers(Stub):
    """A session that gives what it is told, one after the other."""

    generations: list[Generation]
    asked: list[tuple[int, int]] = field(default_factory=list)

    def generate(
        self, prompts: Sequence[Sequence[int]], osl: int, options: BatchOptions | None = None
    ) -> Generation:
        self.asked.append((len(prompts), osl))
        return self.generations.pop(0)


def ran(total_s: float, ttft_s: float = 0.0, shape: tuple[int, ...] = (2, 4)) -> Generation:
    return Generation(tokens=np.zeros(shape, np.int64), ttft_s=ttft_s, total_s=total_s)


def timed(total_s: float, *requests: RequestTiming) -> Generation:
    return Generation(
        tokens=np.zeros((2, 4), np.int64), ttft_s=0.02, total_s=total_s, requests=requests
    )


def sample_of(*made: Generation) -> SpeedSample:
    return SpeedSample.of_waves(made, [(PROMPTS, None)] * len(made), 4)


def measured(*totals_s: float, load: Workload = LOAD) -> dict[str, Any]:
    """The entry of runs that took so long, after a warm-up."""
    session = Answers([ran(total) for total in (1.0, *totals_s)])
    samples = speed_of(load, {"engine": session}, vocab_size=9, repeats=len(totals_s), seed=0)
    return summarize(load, samples["engine"])


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (ran(1.0, shape=(2, 3)), "4 tokens of request 0, got 3"),
        (ran(1.0, shape=(1, 4)), "2 answers, got 1"),
        (ran(1.0, shape=(2, 5)), "4 tokens of request 0, got 5"),
        (ran(0.0), "no run takes such a time"),
        (ran(math.inf, 0.1), "no run takes such a time"),
        (ran(1.0, math.nan), "no run takes such a time"),
        (ran(1.0, 1.5), "no run takes such a time"),
        (timed(1.0, timing(20.0, math.nan)), "a request's time that is negative or not a number"),
    ],
)
def test_what_no_run_gives_is_no_rate(made: Generation, told: str) -> None:
    with pytest.raises(PipelineError, match=told):
        sample_of(made)


def test_without_request_times_latencies_are_plain_medians() -> None:
    session = Answers([ran(9.0), ran(1.0, 0.2), ran(2.0, 0.5), ran(4.0, 0.7)])
    samples = speed_of(LOAD, {"engine": session}, vocab_size=9, repeats=3, seed=0)
    entry = summarize(LOAD, samples["engine"])
    assert entry["ttft_ms"] == 500.0
    assert entry["itl_ms"] == 500.0
    assert "request_latency_ms" not in entry
    assert session.asked == [(2, 4)] * 4


def test_percentiles_are_over_the_requests_of_all_runs() -> None:
    runs: list[Generation] = [
        timed(1.0, timing(10.0 * n, 30.0), timing(10.0 * n + 5.0, 60.0)) for n in (1, 2, 3)
    ]
    warm_up = timed(9.0, timing(999.0, 999.0), timing(999.0, 999.0))
    session = Answers([warm_up, *runs])
    samples = speed_of(LOAD, {"engine": session}, vocab_size=9, repeats=3, seed=0)
    entry = summarize(LOAD, samples["engine"])
    times = [10.0, 15.0, 20.0, 25.0, 30.0, 35.0]
    for name, percent in (("p50", 50), ("p90", 90), ("p99", 99)):
        assert entry["ttft_ms"][name] == pytest.approx(np.percentile(times, percent), abs=1e-3)
    assert entry["itl_ms"]["p50"] == pytest.approx(15.0)
    assert entry["request_latency_ms"].keys() == {"p50", "p90", "p99"}
    assert [len(run["requests"]) for run in entry["runs"]] == [2, 2, 2]
    assert entry["runs"][0]["requests"][1] == {
        "ttft_ms": 15.0, "request_latency_ms": 75.0, "itl_ms": 20.0,
    }  # fmt: skip
    assert json.loads(json.dumps(entry)) == entry


def test_waves_count_as_one_run() -> None:
    waves = [ran(1.0, 0.1), ran(3.0, 0.3)]
    sample = sample_of(*waves)
    assert sample.output_tokens_per_s == pytest.approx(16 / 4.0)
    assert sample.total_tokens_per_s == pytest.approx(36 / 4.0)
    assert sample.ttft_ms == pytest.approx(200.0)
    assert sample.itl_ms == pytest.approx(600.0)
    with pytest.raises(PipelineError, match="4 tokens of request 0, got 3"):
        sample_of(ran(1.0), ran(1.0, shape=(2, 3)))


@dataclass
class Card:
    """Gives out series of readings, and counts how many were on at once."""

    series: list[Samples]
    opened: int = 0

    @contextlib.contextmanager
    def samples(self) -> Iterator[Samples]:
        self.opened += 1
        yield self.series.pop(0)


def series(seconds: float, energy_j: float | None, *memory: int) -> Samples:
    ends = (0.0, seconds)
    energies = (None, None) if energy_j is None else (100.0, 100.0 + energy_j)
    readings = [
        Reading(at_s=at, memory_used_bytes=used, energy_j=energy)
        for at, used, energy in zip(ends, memory, energies, strict=True)
    ]
    return Samples(readings)


def on_card(card: Card, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(speed, "device_samples", card.samples)
    session = Answers([ran(1.0)] * 3)
    samples = speed_of(LOAD, {"engine": session}, vocab_size=9, repeats=2, seed=0)
    return summarize(LOAD, samples["engine"])


def test_figures_of_the_card_are_of_the_timed_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    warm_up = series(9.0, 900.0, 99, 99)
    card = Card([warm_up, series(2.0, 400.0, 5, 9), series(3.0, 400.0, 8, 7)])
    entry = on_card(card, monkeypatch)
    assert card.opened == 3
    assert entry["peak_memory_bytes"] == 9
    assert entry["mean_power_w"] == pytest.approx(800.0 / 5.0)
    assert entry["joules_per_token"] == pytest.approx(800.0 / 16)
    assert [run["mean_power_w"] for run in entry["runs"]] == [200.0, pytest.approx(133.33)]


def test_card_without_an_energy_counter_still_tells_its_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entry = on_card(Card([Samples(), series(2.0, None, 5, 9), series(3.0, 4.0, 8, 7)]), monkeypatch)
    assert entry["peak_memory_bytes"] == 9
    assert "mean_power_w" not in entry
    assert "joules_per_token" not in entry


def test_spread_above_its_bound_is_inconclusive_and_of_one_run_unknown() -> None:
    entry = measured(1.0, 2.0, 4.0)
    assert list(spread_findings([entry], 1.5)) == []
    (wide,) = spread_findings([entry], 1.4999)
    assert wide.kind == "inconclusive"
    assert wide.message.startswith("b2: the 3 runs lie 150.0% apart (2.0 to 8.0 tok/s)")
    (single,) = spread_findings([measured(1.0)], 0.1)
    assert (single.kind, "raise acceptance.repeats" in single.message) == ("note", True)
