"""Every architecture, quantized by ModelOpt, becomes an sm_89 engine whose linears are all FP8."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.cache import StageCache
from pipeline.core.errors import RecipeError
from pipeline.core.values import Checkpoint, Engine
from pipeline.formats.trtrtx.compiler import TrtRtxCompiler
from pipeline.formats.trtrtx.plan_text import read_plan
from pipeline.formats.trtrtx.spec import PLAN_FILE
from pipeline.quant.fp8 import SPEC
from pipeline.quant.unified import UnifiedCheckpoint
from tests.architectures import ARCHITECTURES, WINDOW, tiny_architecture
from tests.quant.tiny_quantized import ADA, CALIBRATION, local_weights, tiny_quantizer

CONTEXT = 96
COMPILER = TrtRtxCompiler(
    max_batch_size=2,
    opt_batch_size=1,
    max_prefill_batch_size=1,
    max_seq_len=CONTEXT,
    activation_dtype="bfloat16",
    kv_cache_dtype="bfloat16",
)
QUICK = ("qwen2.5", "qwen3", "phi3", "phi4-mini")
"""In every run: biases; norms of q and k; a fused, windowed model with heads of 96; partial rotary
and LongRoPE."""


def quantized(root: Path, name: str, *keep_16bit: str, **overrides: Any) -> Checkpoint:
    model_dir = tiny_architecture(name, root / "model", **overrides)
    cache = StageCache(root=root / "cache")
    return tiny_quantizer(*keep_16bit).quantize(local_weights(model_dir), CALIBRATION, cache)


def compiled(root: Path, checkpoint: Checkpoint) -> Engine:
    return COMPILER.compile(checkpoint, ADA, StageCache(root=root / "cache"), root / "logs")


def plan_of(engine: Engine) -> bytes:
    return (engine.dir / PLAN_FILE).read_bytes()


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in ARCHITECTURES],
)
def test_every_linear_is_an_fp8_gemm_of_the_plan(name: str, tmp_path: Path) -> None:
    checkpoint = quantized(tmp_path, name)
    engine = compiled(tmp_path, checkpoint)
    config = UnifiedCheckpoint(checkpoint.dir).spec
    assert CONTEXT > WINDOW
    kinds = engine.checks["network"]["layer_kinds"]
    assert (kinds["ROTARY_EMBEDDING"], kinds["KV_CACHE_UPDATE"]) == (4, 4)  # the cut's two layers

    proof = engine.checks["plan"]
    assert (proof["profiles"], proof["quantized_linears"]) == (2, 3 * 7)
    # qkv, o, gate and up, down: stored fused or not, biased or not, RTX makes four of them.
    assert proof["quantized_gemms"] == 2 * 3 * 4
    plan = plan_of(engine)
    gemms = read_plan(plan)
    assert {gemm.modules for gemm in gemms if not gemm.multiplies(SPEC)} == {("lm_head",)}
    shown = {
        re.sub(r"\.(q|k|v|gate|up)$", "", module)
        for gemm in gemms
        if gemm.multiplies(SPEC)
        for module in gemm.modules
    }
    assert shown == set(checkpoint.quantized_linears)

    cache_bytes = config.kv_bytes(2 * CONTEXT, 2)
    assert engine.min_vram_bytes == len(plan) + cache_bytes
    # The caches are updated in place: no kernel copies one.
    assert b'"present_key.0' in plan
    assert not re.search(rb'function=\{ name=__myl_Move [^{]*args=\{ "past_', plan)


def test_kept_part_of_a_fused_linear_is_a_16_bit_gemm(tmp_path: Path) -> None:
    kept = "model.layers.1.self_attn.qkv_proj"
    engine = compiled(tmp_path, quantized(tmp_path, "phi3", kept))
    other = [gemm.modules for gemm in read_plan(plan_of(engine)) if not gemm.multiplies(SPEC)]
    assert {name for modules in other for name in modules} == {
        "lm_head",
        *(f"{kept}.{part}" for part in ("q", "k", "v")),
    }
    assert engine.checks["plan"]["quantized_linears"] == 3 * 7 - 3


def test_attention_kernel_multiplies_by_an_exact_power_of_two(tmp_path: Path) -> None:
    """The rest of 1 / sqrt(96); left to itself TensorRT-RTX writes 0x1.a44p-4, 0.5 % too much."""
    plan = plan_of(compiled(tmp_path, quantized(tmp_path, "phi3")))
    factors = set(re.findall(rb"= \(float\)__v\d+ \* (0x[0-9a-f.]+p-?\d+)f;", plan))
    assert factors == {b"0x1p-4"}


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("num_attention_heads", 2, "2 heads of 16"),
        ("head_dim", 8, "4 heads of 8"),
        ("head_dim", 20, "20"),
    ],
)
def test_shape_without_an_attention_kernel_is_refused_before_any_work(
    key: str, value: int, shown: str, tmp_path: Path
) -> None:
    checkpoint = quantized(tmp_path, "llama", **{key: value})
    with pytest.raises(
        RecipeError, match=f"no attention kernel for .*{shown}.*compiler=checkpoint"
    ):
        compiled(tmp_path, checkpoint)
    assert not (tmp_path / "cache" / "stages" / "convert").exists()
