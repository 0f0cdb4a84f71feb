"""What fits a card, what a model takes, and by how much it does not fit."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from pipeline.core.errors import Fault
from pipeline.core.hardware import GIB
from pipeline.formats.spec import PAGED_SHARE
from pipeline.plan import make_plan
from pipeline.plan.sizes import PlannedWorkload, PlanRequest

Ask = Callable[..., PlanRequest]
DOWN_PROJ = ("model.layers.*.mlp.down_proj",)


def rtx(ask: Ask, shape: str = "smollm2", **changes: object) -> PlanRequest:
    return ask(
        shape,
        format="trtrtx",
        runtime=("tensorrt-rtx", "1.7.1.116"),
        **({"kv_cache_dtype": "float16"} | changes),
    )


def paths(faults: tuple[Fault, ...]) -> list[str]:
    return [fault.path for fault in faults]


def test_a_sound_request_has_no_faults_and_no_notes(ask: Ask) -> None:
    workload = PlannedWorkload(name="b8", batch=8, isl=1024, osl=1024, min_output_tokens_per_s=500)
    plan = make_plan(ask(workloads=(workload,)))
    assert plan.faults == ()
    assert plan.notes == ()


@pytest.mark.parametrize(
    ("shape", "fp8_kib"), [("phi3", 192), ("mistral", 64), ("qwen2.5", 28), ("llama3.1", 64)]
)
def test_kv_bytes_per_token(shape: str, fp8_kib: int, ask: Ask) -> None:
    assert make_plan(ask(shape)).sizes.kv_bytes_per_token == fp8_kib * 1024
    for dtype in ("bfloat16", "float16"):
        plan = make_plan(ask(shape, kv_cache_dtype=dtype))
        assert plan.sizes.kv_bytes_per_token == 2 * fp8_kib * 1024


@pytest.mark.parametrize(("shape", "engine_mb"), [("smollm2", 220), ("phi3", 4050)])
def test_rtx_engine_size_is_what_was_measured(shape: str, engine_mb: int, ask: Ask) -> None:
    # TensorRT-RTX 1.7.1, two profiles, 2026-11-24.
    assert make_plan(rtx(ask, shape)).sizes.engine_bytes == pytest.approx(engine_mb * 1e6, rel=0.01)


@pytest.mark.parametrize(("shape", "rss_gb"), [("smollm2", 1.5), ("mistral", 12.6)])
def test_rtx_compile_memory_is_what_was_measured(shape: str, rss_gb: float, ask: Ask) -> None:
    assert make_plan(rtx(ask, shape)).build.compile_ram_bytes == pytest.approx(
        rss_gb * 1e9, rel=0.03
    )


def test_keep_16bit_doubles_the_bytes_of_what_it_picks(ask: Ask) -> None:
    plain, kept = make_plan(ask("smollm2")), make_plan(ask("smollm2", keep_16bit=DOWN_PROJ))
    extra = 30 * 1536 * 576
    assert kept.sizes.kept_16bit == 30
    assert kept.sizes.kept_16bit_extra_bytes == extra - 30 * 2 * 4
    assert plain.sizes.quantized_params - kept.sizes.quantized_params == extra
    scales = 30 * 2 * 4
    assert kept.sizes.weight_bytes - plain.sizes.weight_bytes == extra - scales
    assert kept.sizes.step_weight_bytes - plain.sizes.step_weight_bytes == extra - scales


def test_tied_embedding_is_stored_once_and_untied_twice(ask: Ask) -> None:
    tied, untied = make_plan(ask("smollm2")).sizes, make_plan(ask("llama3.1")).sizes
    assert tied.weight_bytes == tied.step_weight_bytes
    assert untied.weight_bytes - untied.step_weight_bytes == 2 * 128256 * 4096


def test_paged_fit_is_held_against_the_workloads_and_not_at_the_limits(ask: Ask) -> None:
    # Batch 64 at full context would take 96 GiB of FP8 cache; the workload takes 4.5.
    small = PlannedWorkload(name="b64", batch=64, isl=128, osl=256)
    request = ask("phi3", max_batch_size=64, max_seq_len=4096, workloads=(small,))
    plan = make_plan(request)
    assert plan.faults == ()
    assert 0 < plan.fit.full_length_sequences < 64
    assert plan.fit.static_kv_bytes == 0


def test_static_fit_is_held_against_the_limits_and_not_at_the_workloads(ask: Ask) -> None:
    small = PlannedWorkload(name="b64", batch=64, isl=128, osl=256)
    request = rtx(
        ask, "phi3", max_batch_size=64, max_seq_len=2047, max_num_tokens=4094, workloads=(small,)
    )
    plan = make_plan(request)
    assert plan.fit.static_kv_bytes == 64 * 2047 * 384 * 1024
    (fault,) = plan.faults
    assert fault.path == "compiler.max_batch_size"
    short = plan.fit.static_kv_bytes - plan.fit.kv_budget_bytes
    said = gib_said(fault.message, "GiB, ", " more than")
    assert said == pytest.approx(short / GIB, abs=0.01)
    batch, context = plan.fit.full_length_sequences, plan.fit.max_context
    assert f"at most batch {batch} at context 2047, or context {context} at batch 64" in (
        fault.message
    )


@pytest.mark.parametrize("static", [True, False], ids=["static", "paged"])
@pytest.mark.parametrize("shape", ["smollm2", "phi3", "llama3.1"])
def test_batch_that_is_shown_to_fit_is_accepted_and_one_more_is_not(
    shape: str, static: bool, ask: Ask
) -> None:
    request = rtx(ask, shape) if static else ask(shape, max_batch_size=4096, max_num_tokens=8192)
    request = replace(request, limits=replace(request.limits, max_seq_len=2048))
    largest = make_plan(request).fit.full_length_sequences
    assert largest > 1
    for batch, fits in ((largest, True), (largest + 1, False)):
        limits = replace(request.limits, max_batch_size=max(batch, request.limits.max_batch_size))
        load = PlannedWorkload(name="full", batch=batch, isl=1024, osl=1024)
        tried = replace(request, limits=limits, workloads=(load,))
        assert (make_plan(tried).faults == ()) is fits, batch


@pytest.mark.parametrize("target", ["rtx4090", "l4"])
def test_context_that_is_shown_to_fit_is_accepted_though_prefill_grows_with_it(
    target: str, ask: Ask
) -> None:
    def recipe(context: int) -> PlanRequest:  # as TensorRT-RTX's settings give it
        return rtx(
            ask,
            "llama3.1",
            target=target,
            max_batch_size=8,
            max_seq_len=context,
            max_num_tokens=8 * context,
        )

    longest = make_plan(recipe(1024)).fit.max_context
    assert make_plan(recipe(longest)).faults == ()
    assert make_plan(recipe(longest + 1)).faults != ()


def test_full_length_that_never_fits_is_a_warning(ask: Ask) -> None:
    (note,) = make_plan(ask(target="rtx4080", max_seq_len=131072, max_num_tokens=2048)).notes
    assert note.severity == "warning"
    assert note.path == "compiler.max_seq_len"


def test_limits_that_contradict_each_other_are_all_reported(ask: Ask) -> None:
    workload = PlannedWorkload(name="b9", batch=9, isl=10000, osl=1)
    request = ask("smollm2", max_seq_len=10000, max_num_tokens=7, workloads=(workload,))
    plan = make_plan(request)
    assert paths(plan.faults) == [
        "compiler.max_seq_len",
        "compiler.max_num_tokens",
        "acceptance.targets[0].isl",
        "acceptance.targets[0].batch",
    ]
    assert "max_num_tokens (7) must be >= max_batch_size (8)" in plan.faults[1].message


def test_workspace_grows_with_what_one_step_holds(ask: Ask) -> None:
    base = make_plan(ask()).fit.workspace_bytes
    widest = 2 * 4096 + 3 * 14336
    assert make_plan(ask(max_num_tokens=4097)).fit.workspace_bytes - base == 2 * widest
    assert make_plan(ask(max_batch_size=9)).fit.workspace_bytes - base == 2 * 4 * 128256
    assert make_plan(ask(max_seq_len=2049)).fit.workspace_bytes == base
    mask = make_plan(rtx(ask, max_seq_len=2049)).fit.workspace_bytes
    assert mask - make_plan(rtx(ask)).fit.workspace_bytes == 4096


def test_build_without_compiler_needs_no_converted_copy(ask: Ask) -> None:
    checkpoint, engine = make_plan(ask("smollm2")).build, make_plan(rtx(ask)).build
    assert set(checkpoint.disk_bytes) == {"weights", "checkpoint"}
    assert set(engine.disk_bytes) == {"weights", "checkpoint", "converted", "engine"}
    assert checkpoint.compile_ram_bytes == 0
    assert checkpoint.quantize_ram_bytes == pytest.approx(3.9e9, rel=0.02)  # measured 2026-11-24


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
