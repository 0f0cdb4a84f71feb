"""Targets as a share of the ceiling, and what acceptance keeps on the disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pipeline.plan import PlannedWorkload, PlanRequest, make_plan
from pipeline.plan.ceilings import REACHABLE_SHARE
from pipeline.runners.workload import Workload
from tests.acceptance.questions import acceptance

Ask = Callable[..., PlanRequest]
B64 = PlannedWorkload(name="b64", batch=64, isl=128, osl=256)


def limits(ask: Ask, **changes: Any) -> PlanRequest:
    return ask(max_batch_size=128, workloads=(replace(B64, **changes),))


def test_share_of_the_ceiling_becomes_a_rate(ask: Ask) -> None:
    plan = make_plan(limits(ask, min_share_of_ceiling=0.5))
    (workload,) = plan.workloads
    assert workload.share == 0.5
    assert workload.target == pytest.approx(0.5 * workload.ceiling)
    rate = make_plan(limits(ask, min_output_tokens_per_s=workload.target)).workloads[0]
    assert rate.target == workload.target
    assert rate.share == pytest.approx(0.5)
    assert rate.reachable_batch == workload.reachable_batch


@pytest.mark.parametrize("target", ["rtx4090", "l4", "h100"])
def test_share_that_is_reachable_warns_on_no_card(target: str, ask: Ask) -> None:
    workload = replace(B64, min_share_of_ceiling=REACHABLE_SHARE)
    plan = make_plan(ask(target=target, max_batch_size=64, workloads=(workload,)))
    assert (plan.faults, plan.notes) == ((), ())


def test_share_that_is_hard_to_reach_is_a_warning_at_its_own_key(ask: Ask) -> None:
    (note,) = make_plan(limits(ask, min_share_of_ceiling=0.9)).notes
    assert note.path == "acceptance.targets[0].min_share_of_ceiling"


LOAD: dict[str, Any] = {"name": "b", "batch": 1, "isl": 2, "osl": 3}


def test_workload_takes_a_rate_or_a_share() -> None:
    with pytest.raises(ValueError, match="keep one of them"):
        Workload(**LOAD, min_output_tokens_per_s=1.0, min_share_of_ceiling=0.5)
    for share in (0.0, 1.01, "0.5"):
        with pytest.raises(ValueError, match="min_share_of_ceiling"):
            Workload(**{**LOAD, "min_share_of_ceiling": share})


def test_share_is_replaced_by_its_rate_once_the_ceiling_is_known() -> None:
    known = Workload(**LOAD, min_share_of_ceiling=0.65).with_rate(1000.0)
    assert (known.min_output_tokens_per_s, known.min_share_of_ceiling) == (650.0, None)
    fixed = Workload(**LOAD, min_output_tokens_per_s=312.0)
    assert fixed.with_rate(1000.0) == fixed
    assert known.digest == fixed.digest


def test_disk_counts_the_log_probabilities_that_acceptance_keeps(ask: Ask) -> None:
    request = ask("smollm2")
    asked = acceptance(windows=36, reference_windows=8, window_tokens=256)
    positions = asked.judged_positions(request.shape)
    assert positions == (36 + 8) * 255
    before = make_plan(request).build
    after = make_plan(replace(request, judged_positions=positions)).build
    # 4,096 ids and log-probabilities of 16 bit, and three numbers of 32 (acceptance/quality.py).
    added = positions * (4096 * (2 + 2) + 12)
    assert after.disk_bytes == {**before.disk_bytes, "source_logprobs": added}
    assert after.to_json()["disk_total_bytes"] - before.to_json()["disk_total_bytes"] == added


def test_model_too_slow_for_this_cpu_keeps_none(ask: Ask) -> None:
    shape = ask("llama3.1").shape
    asked = {"windows": 36, "reference_windows": 8, "window_tokens": 256}
    assert acceptance(**asked).judged_positions(shape) == 0
    assert acceptance(**asked, time_limit_s=1e9).judged_positions(shape) == (36 + 8) * 255
