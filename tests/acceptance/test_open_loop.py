"""Requests that arrive at a rate: when they come, what was kept up with, and what is said of it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from pipeline.acceptance.judge import judge_physics
from pipeline.acceptance.speed import achieved_rate, rate_findings, summarize, theil_sen_slope
from pipeline.plan.ceilings import Roofline
from pipeline.runners.runner import Generation, RequestTiming
from pipeline.runners.workload import BatchOptions, Workload
from tests.acceptance.questions import Stub, speed_of

LOAD = Workload(name="r4", batch=8, isl=8, osl=4, request_rate=4.0, requests=200)


def test_arrivals_are_a_poisson_process_of_exactly_the_asked_rate() -> None:
    many = Workload(name="r", batch=8, isl=8, osl=4, request_rate=4.0, requests=4001)
    at = many.arrivals_s(3)
    assert at == many.arrivals_s(3) != many.arrivals_s(4)
    assert at[0] == 0.0
    assert at[-1] == pytest.approx(4000 / 4.0)
    gaps = np.diff(at)
    assert gaps.min() >= 0
    # Exponential: mean and deviation are equal. Four standard errors, sqrt(2 / 4000) each.
    assert gaps.std() == pytest.approx(0.25, rel=4 * 0.0224)
    # Half of them are shorter than ln 2 of the mean; four standard errors of that share.
    assert (gaps < 0.25 * np.log(2)).mean() == pytest.approx(0.5, abs=4 * 0.0079)
    assert LOAD.arrivals_s(0)[-1] == pytest.approx(199 / 4.0)
    assert Workload(name="b", batch=8, isl=8, osl=4).arrivals_s(0) == ()


def test_all_requests_are_one_call_with_their_arrivals() -> None:
    ((prompts, options),) = LOAD.waves(LOAD.request_prompts(9, 1), 1)
    assert len(prompts) == 200
    assert options == BatchOptions(
        osl_each=(4,) * 200, arrivals_s=LOAD.arrivals_s(1), max_concurrency=8
    )
    message = json.loads(json.dumps(dataclasses.asdict(options), default=sorted))
    assert BatchOptions(**message) == options


def served(
    arrivals: list[float], seconds: float, capacity: float, noise: float = 0.0
) -> list[RequestTiming]:
    """A server that answers `capacity` requests a second at most, one after the other."""
    rng, free, made = random.Random(1), 0.0, []
    for arrival in arrivals:
        free = max(free, arrival) + 1 / capacity
        end = free + seconds + noise * rng.random()
        latency_ms = 1e3 * (end - arrival)
        made.append(
            RequestTiming(
                ttft_ms=latency_ms / 2, request_latency_ms=latency_ms, itl_ms=1.0,
                arrival_s=arrival,
            )
        )  # fmt: skip
    return made


@pytest.mark.parametrize("seed", range(5))
def test_server_that_keeps_up_achieves_the_rate_however_long_requests_take(seed: int) -> None:
    arrivals = list(LOAD.arrivals_s(seed))
    for seconds, noise in ((0.1, 0.0), (5.0, 0.0), (5.0, 5.0)):
        achieved = achieved_rate(served(arrivals, seconds, 400.0, noise))
        assert achieved == pytest.approx(4.0, rel=0.02)
        assert achieved is not None
        assert achieved <= 4.0 + 1e-9  # nobody answers more than comes


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("capacity", [1.0, 2.0, 3.0, 3.6])
def test_server_that_is_too_slow_achieves_what_it_can(seed: int, capacity: float) -> None:
    achieved = achieved_rate(served(list(LOAD.arrivals_s(seed)), 2.0, capacity, 1.0))
    assert achieved == pytest.approx(capacity, rel=0.08)
    assert achieved is not None
    assert achieved < 0.95 * 4.0


def test_slope_bears_stray_points_and_needs_two_places() -> None:
    points = [(float(x), 3.0 * x + (100 if x % 5 == 0 else 0)) for x in range(1000)]
    assert theil_sen_slope(points) == pytest.approx(3.0, abs=0.05)
    with pytest.raises(ValueError, match="two points"):
        theil_sen_slope([(1.0, 2.0), (1.0, 3.0)])


@dataclass
class Server(Stub):
    """A session that answers as `served` does."""

    capacity: float
    asked: list[BatchOptions | None] = field(default_factory=list)

    def generate(self, prompts: Any, osl: int, options: BatchOptions | None = None) -> Generation:
        assert options is not None
        self.asked.append(options)
        requests = tuple(served(list(options.arrivals_s), 0.5, self.capacity))
        ends = [(r.arrival_s or 0.0) + r.request_latency_ms / 1e3 for r in requests]
        return Generation(
            tokens=np.zeros((len(prompts), osl), np.int64), ttft_s=0.1, total_s=max(ends),
            lengths=options.osl_each, requests=requests,
        )  # fmt: skip


def measured(capacity: float, workload: Workload = LOAD) -> dict[str, Any]:
    server = Server(capacity)
    samples = speed_of(workload, {"engine": server}, vocab_size=9, repeats=3, seed=0)
    assert len(server.asked) == 4  # one warm-up
    return summarize(workload, samples["engine"])


def test_entry_has_the_asked_and_the_achieved_rate_and_latencies_from_the_arrival() -> None:
    entry = measured(400.0)
    assert entry["request_rate"] == {"asked": 4.0, "achieved": pytest.approx(4.0, rel=0.01)}
    assert entry["request_latency_ms"].keys() == {"p50", "p90", "p99"}
    assert entry["batch"] == 8
    assert entry["load"]["request_rate"] == 4.0
    first = entry["runs"][0]
    arrivals = [request["arrival_s"] for request in first["requests"]]
    assert arrivals == [round(at, 3) for at in LOAD.arrivals_s(0)]
    slow = measured(2.0)
    assert slow["request_rate"]["achieved"] == pytest.approx(2.0, rel=0.05)
    # The queue is in the latencies: the last of 200 waits for about 50 s.
    assert slow["request_latency_ms"]["p99"] > 40_000 > entry["request_latency_ms"]["p99"]
    # Tokens a second are of the whole run: the last request ends after 100 s.
    assert slow["output_tokens_per_s"] == pytest.approx(200 * 4 / 100.5, rel=0.02)


@pytest.mark.parametrize(
    ("achieved", "demanded", "kinds"),
    [
        (3.8, True, []),
        (3.7999, True, ["rejected"]),
        (3.7999, False, ["note"]),
        (float("nan"), True, ["rejected"]),
    ],
)
def test_rate_that_was_not_kept_up_with_is_told_at_the_exact_threshold(
    achieved: float, demanded: bool, kinds: list[str]
) -> None:
    entry = {**measured(400.0), "request_rate": {"asked": 4.0, "achieved": achieved}}
    found = list(rate_findings([entry, {"workload": "b1"}], demanded=demanded))
    assert [finding.kind for finding in found] == kinds
    assert all(finding.message.startswith("r4: 4 requests arrive a second") for finding in found)


def test_slow_arrivals_are_no_slow_engine_but_too_fast_is_a_fault_still() -> None:
    line = Roofline(
        bandwidth_bytes_per_s=1e12, step_weight_bytes=10**9, kv_bytes_per_token=1000,
        windows=(None,), layer_s_per_token=1e-6, lm_head_s_per_token=1e-6,
    )  # fmt: skip
    for open_loop, rate in itertools.product((True, False), (10.0, 1e9)):
        load: dict[str, Any] = {
            "workload": "r", "batch": 8, "isl": 9, "osl": 5, "mean_isl": 8.5, "mean_osl": 4.25,
            "output_tokens_per_s": rate,
        }  # fmt: skip
        if open_loop:
            load["request_rate"] = {"asked": 1.0, "achieved": 1.0}
        kinds = [finding.kind for finding in judge_physics([load], line)]
        assert kinds == (["anomalous"] if rate == 1e9 else [] if open_loop else ["note"])
