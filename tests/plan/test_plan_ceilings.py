"""Ceilings of a workload, and targets held against them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pipeline.core.errors import RecipeError
from pipeline.formats.spec import format_spec
from pipeline.plan import make_plan, refuse
from pipeline.plan.ceilings import REACHABLE_SHARE, Roofline, WorkloadPlan
from pipeline.plan.sizes import PlannedWorkload, PlanRequest
from pipeline.quant.spec import quant_spec
from pipeline.runners.workload import Workload
from tests.acceptance.questions import acceptance

Ask = Callable[..., PlanRequest]
B1 = PlannedWorkload(name="b1", batch=1, isl=128, osl=256)


def planned(request: PlanRequest, **changes: Any) -> WorkloadPlan:
    (workload,) = make_plan(replace(request, workloads=(replace(B1, **changes),))).workloads
    return workload


@pytest.mark.parametrize(
    ("shape", "fp8", "fp16", "batch_for_312"),
    [
        ("phi3", 264, 135, 2),
        ("mistral", 139, 71, 4),
        ("qwen2.5", 132, 71, 4),
        ("llama3.1", 126, 67, 4),
    ],
)
def test_ceilings_of_a_4090_are_bandwidth_over_the_bytes_of_a_step(
    shape: str, fp8: int, fp16: int, batch_for_312: int, ask: Ask
) -> None:
    # From the public dimensions: 1008 GB/s over FP8 linears + 16-bit lm_head, no KV cache.
    request = ask(shape, kv_cache_dtype="bfloat16")
    workload = planned(request, min_output_tokens_per_s=312)
    assert round(workload.ceiling_without_kv) == fp8
    assert workload.ceiling < workload.ceiling_without_kv
    assert workload.bound == "memory"
    assert workload.reachable_batch == batch_for_312
    assert round(planned(replace(request, precision=quant_spec("bf16"))).ceiling_without_kv) == fp16


def test_kv_cache_of_all_sequences_is_read_in_each_step(ask: Ask) -> None:
    workload = planned(ask(), batch=8, isl=1000, osl=2)
    # One decode step, at 1001 tokens of context; 64 KiB of FP8 cache for each of them.
    weights = 6_979_321_856 + 2 * 128256 * 4096  # FP8 linears, 16-bit lm_head
    step_bytes = weights + 8 * 1001 * 65536
    assert workload.ceiling == pytest.approx(8 * 1008e9 / step_bytes, rel=1e-4)


def test_large_batch_is_bound_by_flops(ask: Ask) -> None:
    workload = planned(ask("llama3.1", "l4", max_batch_size=2048), batch=2048, isl=1, osl=2)
    assert workload.bound == "compute"
    linears, lm_head = 6_979_321_856, 128256 * 4096
    seconds = 2 * linears / 242.5e12 + 2 * lm_head / 121e12
    assert workload.ceiling == pytest.approx(1 / seconds)


def test_prefill_is_bound_by_flops_and_ttft_by_the_larger_bound(ask: Ask) -> None:
    short, long = planned(ask(), isl=16), planned(ask(), isl=1600)
    assert long.prefill_tokens_per_s == pytest.approx(330.3e12 / (2 * 6_979_321_856))
    assert short.ttft_floor_ms == pytest.approx(
        1e3 / short.ceiling_without_kv
    )  # reads weights once
    assert long.ttft_floor_ms == pytest.approx(1e3 * 1600 / long.prefill_tokens_per_s, rel=0.01)


@pytest.mark.parametrize("window", [None, 5, 12, 14, 100])
@pytest.mark.parametrize(("isl", "osl"), [(10, 2), (10, 7), (3, 1)])
def test_mean_context_is_the_mean_over_decode_steps(isl: int, osl: int, window: int | None) -> None:
    line = Roofline(
        bandwidth_bytes_per_s=1.0,
        step_weight_bytes=1,
        kv_bytes_per_token=1,
        windows=(window,),
        layer_s_per_token=1.0,
        lm_head_s_per_token=1.0,
    )
    seen = [min(isl + step, window or 10**9) for step in range(1, max(osl, 2))]
    assert line.mean_context(isl, osl) == pytest.approx(sum(seen) / len(seen))


def test_impossible_target_is_refused_with_the_batch_that_makes_it_reachable(ask: Ask) -> None:
    plan = make_plan(ask(workloads=(replace(B1, min_output_tokens_per_s=312),)))
    (fault,) = plan.faults
    assert fault.path == "acceptance.targets[0].min_output_tokens_per_s"
    assert fault.message == (
        "312 tok/s at batch 1 is above this card's ceiling of 125 (126 without its KV cache); "
        "at batch >= 4 it is reachable"
    )
    with pytest.raises(RecipeError, match="312 tok/s at batch 1") as error:
        refuse(plan)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("share", "faults", "notes"), [(0.65, 0, 0), (0.6501, 0, 1), (1.0, 0, 1), (1.0001, 1, 0)]
)
def test_reachable_is_65_percent_and_impossible_is_above_100(
    share: float, faults: int, notes: int, ask: Ask
) -> None:
    ceiling = planned(ask()).ceiling
    workload = replace(B1, min_output_tokens_per_s=share * ceiling)
    plan = make_plan(ask(workloads=(workload,)))
    assert (len(plan.faults), len(plan.notes)) == (faults, notes)
    if notes:
        assert "up to 65% is held to be reachable; at batch >= 2 it is" in plan.notes[0].message
        assert plan.notes[0].severity == "warning"


def test_reachable_batch_must_fit_the_memory(ask: Ask) -> None:
    # 4000 tok/s need a batch of about 300; at 192 KiB a token the card holds about 90.
    request = ask("phi3")
    changes = {"batch": 8, "isl": 512, "osl": 512, "min_output_tokens_per_s": 4000}
    assert planned(request, **changes).reachable_batch is None
    roomy = replace(request, target=replace(request.target, memory_gib=1000.0))
    batch = planned(roomy, **changes).reachable_batch
    assert batch is not None
    assert batch > 90


def test_reachable_batch_of_a_static_cache_counts_full_contexts(ask: Ask) -> None:
    # The same short workload: paged runtimes hold 32 tokens of it, the static cache all 4096.
    changes = {"isl": 16, "osl": 16, "min_output_tokens_per_s": 9000}
    paged = ask("phi3", max_seq_len=4096, kv_cache_dtype="float16")
    static = replace(paged, format=format_spec("trtrtx"), runtime=("tensorrt-rtx", "1.7.1"))
    assert planned(paged, **changes).reachable_batch is not None
    assert planned(static, **changes).reachable_batch is None


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
