"""The judge, at the exact thresholds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

import pytest

from pipeline.acceptance.judge import (
    L2_CACHE_BYTES,
    TOLERANCE,
    ceiling_share,
    judge,
    judge_physics,
    run_ceiling,
)
from pipeline.acceptance.report import junit
from pipeline.core.errors import RecipeError
from pipeline.core.values import Report
from pipeline.plan.ceilings import Roofline
from pipeline.sources.text.topics import PydocTopics
from tests.acceptance.questions import acceptance
from tests.specs import tiny_spec

LIMITS = acceptance()


def quality(
    *, change: float = 0.0, high: float | None = None, kl: float = 0.0, top1: float = 1.0
) -> dict[str, Any]:
    return {
        "perplexity_change": {
            "value": change, "low": change, "high": change if high is None else high,
        },
        "mean_kl_nats": {"value": kl},
        "top1_agreement": {"value": top1},
    }  # fmt: skip


def speed(rate: float = 10.0, wanted: float | None = None) -> dict[str, Any]:
    return {"workload": "b1", "output_tokens_per_s": rate, "min_output_tokens_per_s": wanted}


def report(
    *speeds: dict[str, Any], figures: dict[str, Any] | None = None, not_run: tuple[str, ...] = ()
) -> Report:
    return Report(
        digest="d" * 64, card="CARD", conditions={}, speed=speeds,
        quality=quality() if figures is None else figures, not_run=not_run, checks={},
    )  # fmt: skip


def verdict_of(made: Report) -> str:
    return judge(made, LIMITS, ran=True, on_target=False).name


def above(value: float) -> float:
    return math.nextafter(value, math.inf)


def below(value: float) -> float:
    return math.nextafter(value, -math.inf)


@pytest.mark.parametrize(
    ("ran", "on_target", "name"),
    [(True, True, "accepted"), (True, False, "checked"), (False, False, "compiled")],
)
def test_passing_verdict_says_where_it_ran(ran: bool, on_target: bool, name: str) -> None:
    verdict = judge(report(), LIMITS, ran=ran, on_target=on_target)
    assert verdict.name == name
    assert verdict.passed


@pytest.mark.parametrize(
    ("good", "bad", "name"),
    [
        (quality(change=0.01), quality(change=above(0.01)), "regression"),
        (quality(kl=0.06), quality(kl=above(0.06)), "regression"),
        (quality(top1=0.85), quality(top1=below(0.85)), "regression"),
        (
            quality(change=-0.5, high=-0.01),
            quality(change=-0.5, high=below(-0.01)),
            "anomalous",
        ),
    ],
)
def test_quality_passes_at_the_limit_and_fails_one_ulp_beyond(
    good: dict[str, Any], bad: dict[str, Any], name: str
) -> None:
    assert verdict_of(report(figures=good)) == "checked"
    assert verdict_of(report(figures=bad)) == name


def test_speed_passes_at_the_limit_and_is_rejected_one_ulp_below() -> None:
    assert verdict_of(report(speed(5.0, 5.0))) == "checked"
    assert verdict_of(report(speed(below(5.0), 5.0))) == "rejected"
    assert verdict_of(report(speed(0.001))) == "checked"  # without a limit


FAULTS = {
    "anomalous": quality(change=-0.5, high=-0.4),
    "regression": quality(kl=1.0),
    "rejected": speed(1.0, 2.0),
}


@pytest.mark.parametrize(("worse", "milder"), list(itertools.combinations(FAULTS, 2)))
def test_worst_finding_names_the_verdict_and_all_are_kept(worse: str, milder: str) -> None:
    chosen = [FAULTS[worse], FAULTS[milder]]
    figures = quality()
    for fault in chosen:
        for key, value in fault.items():
            if key in figures and value != quality()[key]:
                figures[key] = value
    speeds = [fault for fault in chosen if "workload" in fault]
    verdict = judge(report(*speeds, figures=figures), LIMITS, ran=True, on_target=False)
    assert verdict.name == worse
    assert {finding.kind for finding in verdict.findings} == {worse, milder}
    assert not verdict.passed


def test_what_was_not_run_is_a_note_that_fails_nothing() -> None:
    verdict = judge(report(not_run=("the card",)), LIMITS, ran=True, on_target=False)
    assert [(f.kind, f.message) for f in verdict.findings] == [("note", "not run: the card")]
    assert verdict.passed


def test_junit_has_a_case_for_each_workload_quality_and_what_was_not_run() -> None:
    made = report(speed(1.0, 2.0), figures=quality(kl=1.0), not_run=("the card",))
    verdict = judge(made, LIMITS, ran=True, on_target=False)
    suite = ElementTree.fromstring(junit(made.to_json(verdict)))
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("3", "2", "1")
    failures = {
        case.get("name"): [str(failure.get("message")) for failure in case.findall("failure")]
        for case in suite
    }
    assert failures["speed.b1"] == ["rejected: b1: 1.0 tok/s, 2.0 are required"]
    assert failures["quality"][0].startswith("regression: mean KL 1.0000")
    assert failures["the card"] == []
    assert suite.find("testcase[@name='the card']/skipped") is not None


def with_reference(kl: float, floor: float, *, judged: bool = True) -> Report:
    reference = {
        "engine": {"mean_kl_nats": {"value": kl}},
        "noise_floor": {"mean_kl_nats": {"value": floor}},
        "judged": judged,
    }
    return report(figures={**quality(), "checkpoint_reference": reference})


def test_engine_may_be_as_far_from_its_checkpoint_as_twice_the_noise() -> None:
    assert verdict_of(with_reference(0.01, 0.005)) == "checked"
    assert verdict_of(with_reference(above(0.01), 0.005)) == "regression"
    assert verdict_of(with_reference(above(0.01), 0.005, judged=False)) == "checked"


def test_without_noise_a_divergence_that_nobody_can_tell_is_allowed() -> None:
    assert verdict_of(with_reference(0.001, 0.0)) == "checked"
    assert verdict_of(with_reference(above(0.001), 0.0)) == "regression"


def test_model_beyond_memory_or_time_is_not_run() -> None:
    question = acceptance()
    need = 12 * tiny_spec().params
    assert question.too_much(tiny_spec(), need) is None
    assert "GB RAM" in str(question.too_much(tiny_spec(), need - 1))
    tokens = 2 * (4 + 2) * 64
    seconds = 2.0 * tiny_spec().params * tokens / 1e11
    assert acceptance(time_limit_s=seconds).too_much(tiny_spec(), need) is None
    assert "time_limit_s" in str(
        acceptance(time_limit_s=seconds * 0.999).too_much(tiny_spec(), need)
    )


def test_text_that_calibration_has_seen_is_refused() -> None:
    question = acceptance()
    question.check_text(PydocTopics(part="calibrate").documents())
    with pytest.raises(RecipeError, match=r"acceptance\.text: shares \d+ runs of 13 words"):
        question.check_text(PydocTopics(part="judge").documents()[:1])


def test_windows_beyond_the_context_are_named() -> None:
    acceptance().check_inputs(tiny_spec(), 64)
    with pytest.raises(RecipeError) as caught:
        acceptance().check_inputs(tiny_spec(), 8)
    paths = [fault.path for fault in caught.value.faults]
    assert paths == ["acceptance.window_tokens"]


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
