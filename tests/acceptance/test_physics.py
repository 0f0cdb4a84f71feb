"""The physics check at its exact thresholds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest

from pipeline.acceptance.judge import (
    L2_CACHE_BYTES,
    TOLERANCE,
    ceiling_share,
    judge_physics,
    run_ceiling,
)
from pipeline.plan.ceilings import Roofline

LINE = Roofline(
    bandwidth_bytes_per_s=1024e9,
    step_weight_bytes=4_000_000_000,
    kv_bytes_per_token=100_000,
    windows=(None,),
    layer_s_per_token=2.0e-5,
    lm_head_s_per_token=1.0e-6,
)


def load(rate: float = 1.0, *, batch: int = 1, isl: int = 128, osl: int = 256) -> Mapping[str, Any]:
    return {
        "workload": "b", "batch": batch, "isl": isl, "osl": osl, "output_tokens_per_s": rate,
    }  # fmt: skip


def ceiling(measured: Mapping[str, Any], bandwidth: float = 1024e9, cached: int = 0) -> float:
    value, _ = run_ceiling(
        measured, LINE, bandwidth_bytes_per_s=bandwidth, cached_weight_bytes=cached
    )
    return value


def kinds(rate: float, measured: float | None = None) -> list[str]:
    return [finding.kind for finding in judge_physics([load(rate)], LINE, measured)]


def allowed(bandwidth: float = 1024e9) -> float:
    return (1 + TOLERANCE) * ceiling(load(), bandwidth, L2_CACHE_BYTES)


def test_ceiling_of_a_run_is_bytes_over_bandwidth_by_hand() -> None:
    # 4 steps of 4 GB; 3 decode steps that see 11, 12 and 13 tokens of 2 sequences.
    run = load(batch=2, isl=10, osl=4)
    seconds = (4 * 4e9 + 2 * (11 + 12 + 13) * 100_000) / 1024e9
    value, bound = run_ceiling(run, LINE, bandwidth_bytes_per_s=1024e9)
    assert value == pytest.approx(2 * 4 / seconds, rel=1e-12)
    assert bound == "memory"


def test_ceiling_of_a_prefill_is_flops_by_hand() -> None:
    value, bound = run_ceiling(load(batch=8, isl=4096, osl=1), LINE, bandwidth_bytes_per_s=1024e9)
    assert value == pytest.approx(8 / (8 * (4096 * 2.0e-5 + 1.0e-6)), rel=1e-12)
    assert bound == "compute"


@pytest.mark.parametrize("batch", [1, 8, 32])
def test_long_memory_bound_decode_has_the_plans_ceiling(batch: int) -> None:
    planned = LINE.decode_tokens_per_s(batch, LINE.mean_context(128, 1024))
    assert ceiling(load(batch=batch, osl=1024)) == pytest.approx(planned, rel=0.002)


def test_allowed_rate_passes_and_the_next_one_is_anomalous() -> None:
    assert allowed() > 1.05 * ceiling(load())
    assert kinds(allowed()) == []
    assert kinds(math.nextafter(allowed(), math.inf)) == ["anomalous"]


def test_the_larger_bandwidth_decides_what_is_anomalous() -> None:
    slower, faster = 900e9, 1100e9
    assert kinds(allowed(), slower) == []
    assert kinds(allowed(faster), faster) == []
    assert kinds(math.nextafter(allowed(faster), math.inf), faster) == ["anomalous"]


def test_share_at_the_limit_passes_and_the_next_one_below_is_a_note() -> None:
    least = 0.25 * ceiling(load())
    assert kinds(least) == []
    assert kinds(math.nextafter(least, 0.0)) == ["note"]


def test_share_is_of_the_measured_bandwidth_where_there_is_one() -> None:
    run = load(100.0)
    listed, probed = ceiling_share(run, LINE), ceiling_share(run, LINE, 512e9)
    assert (listed["bandwidth"], probed["bandwidth"]) == ("listed", "measured")
    assert probed["share"] == pytest.approx(2 * listed["share"])
    assert listed["share"] == 100.0 / listed["ceiling_tokens_per_s"]


def test_held_back_card_is_named_first_among_the_reasons() -> None:
    at = 0.85 * 1024e9
    for bandwidth, named in ((at, False), (math.nextafter(at, 0.0), True)):
        (finding,) = judge_physics([load(1.0)], LINE, bandwidth)
        assert ("likely: the probe copied 870 of 1024 GB/s" in finding.message) is named


def test_h100_figures_of_phi3_are_neither_anomalous_nor_low() -> None:
    # vLLM 0.24 on an H100: 357 tok/s at batch 1, 12379 at 128 with an FP8 KV cache (2026-11-24).
    phi3 = Roofline(
        bandwidth_bytes_per_s=3350e9, step_weight_bytes=3_820_000_000,
        kv_bytes_per_token=192 * 1024, windows=(2047,),
        layer_s_per_token=2 * 3.62e9 / 1979e12, lm_head_s_per_token=2 * 98.5e6 / 989e12,
    )  # fmt: skip
    runs = [load(357.0), load(12379.0, batch=128)]
    assert list(judge_physics(runs, phi3)) == []
    assert ceiling_share(runs[0], phi3)["share"] == pytest.approx(0.41, abs=0.01)
    # A rate after dividing by the wrong time.
    assert [f.kind for f in judge_physics([load(920.0 * 1.05)], phi3)] == ["anomalous"]
