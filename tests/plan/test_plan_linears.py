from __future__ import annotations

from collections.abc import Callable

import pytest

from pipeline.model.shapes import ModelShape
from pipeline.plan import keep_16bit_faults, linear_modules, select


@pytest.mark.parametrize("name", ["smollm2", "phi3", "mistral", "qwen2.5", "llama3.1"])
def test_linears_add_up_to_the_shape(name: str, shape_of: Callable[[str], ModelShape]) -> None:
    shape = shape_of(name)
    assert sum(linear_modules(shape).values()) == shape.linear_params


def test_phi3_has_fused_linears_and_llama_has_seven(
    shape_of: Callable[[str], ModelShape],
) -> None:
    phi, llama = linear_modules(shape_of("phi3")), linear_modules(shape_of("llama3.1"))
    assert len(phi) == 32 * 4
    assert phi["model.layers.31.mlp.gate_up_proj"] == 3072 * 2 * 8192
    assert len(llama) == 32 * 7
    assert llama["model.layers.0.self_attn.k_proj"] == 4096 * 8 * 128


def test_patterns_select_in_model_order_and_once(shape_of: Callable[[str], ModelShape]) -> None:
    modules = linear_modules(shape_of("smollm2"))
    picked = select(["*.29.mlp.down_proj", "model.layers.1.*.down_proj", "*.1.mlp.*"], modules)
    assert picked == (
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.29.mlp.down_proj",
    )


def test_pattern_that_matches_nothing_is_a_fault(shape_of: Callable[[str], ModelShape]) -> None:
    modules = linear_modules(shape_of("phi3"))
    (fault,) = keep_16bit_faults(["*.down_proj", "*.q_proj"], modules)
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
def test_splitting_what_runtimes_fuse_is_a_fault(
    patterns: list[str], faults: int, shape_of: Callable[[str], ModelShape]
) -> None:
    found = keep_16bit_faults(patterns, linear_modules(shape_of("llama3.1")))
    assert len(found) == faults
    assert all("one precision" in fault.message for fault in found)
