"""Choices of a quantizer that need no model: ranges, devices, and linears that stay 16-bit."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.errors import CorruptError, IncompatibleError
from pipeline.quant.calibration import (
    OUTLIER_FACTOR,
    DeviceChoice,
    activation_bytes,
    bf16_scale,
    check_amax,
    choose_placement,
    cpu_dtype,
)
from pipeline.quant.spec import FP8_E4M3_MAX, keep_16bit_faults, select
from tests.specs import shape, tiny_spec

SHAPE = tiny_spec(num_hidden_layers=30)


TOKENS = 64


WHOLE = 2 * SHAPE.params + activation_bytes(SHAPE, TOKENS)


LAYER = 2 * SHAPE.linear_params // 30 + 4 * SHAPE.embedding_params + activation_bytes(SHAPE, TOKENS)


def layers(*values: float) -> dict[str, float]:
    return {f"model.layers.{i}.mlp.input_quantizer": v for i, v in enumerate(values)}


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -1.0])
def test_amax_that_is_no_range_is_refused_by_name(value: float) -> None:
    with pytest.raises(CorruptError) as caught:
        check_amax(layers(1.0, value, 2.0))
    assert f"model.layers.1.mlp.input_quantizer = {value}" in str(caught.value)
    assert "1 quantizers" in str(caught.value)
    assert "quantizer.keep_16bit" in str(caught.value)


def test_activation_far_beyond_its_kind_is_named() -> None:
    (line,) = check_amax(layers(1.0, 1.0, 1.0, OUTLIER_FACTOR * 2))
    assert line.startswith("model.layers.3.mlp.input_quantizer: ")
    assert "100 x the median" in line


def test_activation_at_the_factor_or_of_another_kind_is_no_outlier() -> None:
    others = {f"model.layers.{i}.attn.input_quantizer": 1000.0 for i in range(3)}
    assert check_amax({**layers(1.0, 1.0, OUTLIER_FACTOR), **others}) == []


@pytest.mark.parametrize(
    ("choice", "free", "kind"),
    [
        ("auto", WHOLE, "cuda"),
        ("auto", WHOLE - 1, "layerwise"),
        ("auto", LAYER, "layerwise"),
        ("auto", LAYER - 1, "cpu"),
        ("auto", None, "cpu"),
        ("cuda", WHOLE, "cuda"),
        ("layerwise", WHOLE, "layerwise"),
        ("layerwise", LAYER, "layerwise"),
        ("cpu", WHOLE, "cpu"),
        ("cpu", None, "cpu"),
    ],
)
def test_placement_at_its_limits(choice: DeviceChoice, free: int | None, kind: str) -> None:
    placement = choose_placement(choice, SHAPE, batch_tokens=TOKENS, free_vram_bytes=free)
    assert placement.kind == kind


@pytest.mark.parametrize(
    ("choice", "free"),
    [("cuda", WHOLE - 1), ("layerwise", LAYER - 1), ("cuda", None), ("layerwise", None)],
)
def test_device_that_cannot_be_is_refused_with_the_next_step(
    choice: DeviceChoice, free: int | None
) -> None:
    with pytest.raises(IncompatibleError, match=f"quantizer.device={choice}") as caught:
        choose_placement(choice, SHAPE, batch_tokens=TOKENS, free_vram_bytes=free)
    assert "quantizer.device=auto" in str(caught.value)


@settings(deadline=None)  # the first example imports torch
@given(st.floats(min_value=2.0**-20, max_value=2.0**20, width=32))
def test_rounded_scale_covers_amax_and_is_at_most_one_bfloat16_step_above(amax: float) -> None:
    import torch

    wanted = torch.tensor(amax, dtype=torch.float32) / FP8_E4M3_MAX
    scale = bf16_scale(torch.tensor(amax), FP8_E4M3_MAX).float()
    exact = scale.to(torch.bfloat16)
    assert exact.float() == scale
    assert scale >= wanted
    below = torch.nextafter(exact, torch.tensor(0.0, dtype=torch.bfloat16))
    assert below.float() < wanted, "a smaller bfloat16 scale would have covered amax"


def test_cpu_takes_float32_while_it_fits() -> None:
    fits = int(5.2 * SHAPE.params + 3.2e9) + 1
    assert cpu_dtype(SHAPE, fits) == "float32"
    assert cpu_dtype(SHAPE, fits - 2) == "bfloat16"


def test_patterns_select_in_model_order_and_once() -> None:
    modules = shape("smollm2").modules
    picked = select(["*.29.mlp.down_proj", "model.layers.1.*.down_proj", "*.1.mlp.*"], modules)
    assert picked == (
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.29.mlp.down_proj",
    )


def test_pattern_that_matches_nothing_is_a_fault() -> None:
    (fault,) = keep_16bit_faults(["*.down_proj", "*.q_proj"], shape("phi3"))
    assert fault.path == "quantizer.keep_16bit[1]"
    assert "'*.q_proj' matches no linear" in fault.message
    assert "model.layers.0.self_attn.qkv_proj" in fault.message


@pytest.mark.parametrize(
    ("patterns", "faults"),
    [
        (["*.down_proj"], 0),
        (["*.mlp.*"], 0),
        (["*.q_proj", "*.k_proj", "*.v_proj"], 0),
        (["*.q_proj"], 1),
        (["model.layers.3.mlp.up_proj"], 1),
    ],
)
def test_splitting_what_runtimes_fuse_is_a_fault(patterns: list[str], faults: int) -> None:
    found = keep_16bit_faults(patterns, shape("llama3.1"))
    assert len(found) == faults
    assert all("one precision" in fault.message for fault in found)
