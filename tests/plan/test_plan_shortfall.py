"""A model that does not fit: by how much, and the largest that does."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from pipeline.core.errors import Fault
from pipeline.core.hardware import GIB
from pipeline.formats.spec import PAGED_SHARE
from pipeline.plan import PlannedWorkload, PlanRequest, make_plan

Ask = Callable[..., PlanRequest]
RTX = {"format": "trtrtx", "runtime": ("tensorrt-rtx", "1.7.1"), "kv_cache_dtype": "bfloat16"}
TRTLLM = {"format": "trtllm", "runtime": ("tensorrt-llm", "1.2.1")}


def only_fault(request: PlanRequest) -> Fault:
    (fault,) = make_plan(request).faults
    return fault


def gib_said(message: str, before: str, after: str) -> float:
    """The one figure in GiB between two words of a message."""
    (figure,) = re.findall(rf"{before}([\d.]+) GiB{after}", message)
    return float(figure)


@pytest.mark.parametrize("settings", [TRTLLM, RTX], ids=["paged", "static"])
def test_a_model_too_large_says_by_how_much(settings: dict[str, object], ask: Ask) -> None:
    request = ask(max_batch_size=1, max_seq_len=64, max_num_tokens=64, **settings)
    small = replace(request, target=replace(request.target, memory_gib=8.0))
    fault = only_fault(small)
    assert fault.path == "target"
    assert "does not fit rtx4090, by " in fault.message
    missing = gib_said(fault.message, "by ", ": weights")

    share = 1.0 if settings is RTX else PAGED_SHARE
    enough = 8.0 + (missing + 0.01) / share
    for gib, fits in [(enough, True), (enough - 0.03, False)]:
        tried = replace(small, target=replace(request.target, memory_gib=gib))
        faults = [fault.path for fault in make_plan(tried).faults]
        assert ("target" not in faults) == fits, gib


def test_a_paged_workload_too_large_says_by_how_much_and_the_largest_batch(ask: Ask) -> None:
    load = PlannedWorkload(name="long", batch=64, isl=2048, osl=2048)
    request = ask("llama3.1", max_batch_size=64, max_seq_len=4096, workloads=(load,), **TRTLLM)
    plan = make_plan(request)
    fault = only_fault(request)
    assert fault.path == "acceptance.targets[0].batch"
    needed = 64 * 4096 * plan.fit.kv_bytes_per_token
    said = gib_said(fault.message, ", ", " more than")
    assert said == pytest.approx((needed - plan.fit.kv_budget_bytes) / GIB, abs=0.01)

    largest = int(fault.message.rpartition(" ")[2])
    for batch, fits in [(largest, True), (largest + 1, False)]:
        tried = replace(request, workloads=(replace(load, batch=batch),))
        assert (not make_plan(tried).faults) == fits, batch


def test_a_static_cache_too_large_says_by_how_much(ask: Ask) -> None:
    request = ask("llama3.1", max_batch_size=64, max_seq_len=4096, max_num_tokens=4096, **RTX)
    plan = make_plan(request)
    fault = only_fault(request)
    said = gib_said(fault.message, "GiB, ", " more than")
    short = plan.fit.static_kv_bytes - plan.fit.kv_budget_bytes
    assert said == pytest.approx(short / GIB, abs=0.01)
