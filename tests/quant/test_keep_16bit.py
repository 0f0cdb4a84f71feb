from __future__ import annotations

import pytest

from pipeline.quant.spec import keep_16bit_faults, select
from tests.specs import shape


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
