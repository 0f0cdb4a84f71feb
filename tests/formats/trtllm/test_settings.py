"""Settings that TensorRT-LLM would change in silence, or refuse after minutes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tests.formats.trtllm.settings import compiler
from tests.quant.tiny_quantized import ADA


def test_limits_name_the_type_that_the_cache_has() -> None:
    assert compiler().limits.kv_cache_dtype == "fp8"
    assert compiler(kv_cache_dtype="bfloat16").limits.kv_cache_dtype == "bfloat16"
    half = compiler(kv_cache_dtype="bfloat16", dtype="float16")
    assert half.limits.kv_cache_dtype == "float16"


@pytest.mark.parametrize(
    ("plugins", "fields", "message"),
    [
        ({}, {"max_num_tokens": 3}, r"max_num_tokens \(3\) must be >= max_batch_size \(4\)"),
        ({}, {"max_num_tokens": 31}, r"\(31\) must be >= plugins.tokens_per_block \(32\)"),
        ({}, {"kv_cache_dtype": "float16"}, r"kv_cache_dtype \(float16\) must be fp8 or dtype"),
        ({}, {"opt_num_tokens": 8}, r"opt_num_tokens \(8\) does not go with plugins.multiple"),
        (
            {"multiple_profiles": False},
            {"opt_num_tokens": 257},
            r"opt_num_tokens \(257\) must be <= max_num_tokens \(256\)",
        ),
    ],
)
def test_what_does_not_go_together_is_a_recipe_fault(
    plugins: dict[str, Any], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        compiler(plugins, **fields)


@pytest.mark.parametrize(("asked", "built"), [(32, 32), (512, 512), (513, 512)])
def test_an_iteration_takes_no_more_tokens_than_all_requests_have(asked: int, built: int) -> None:
    made = compiler(max_num_tokens=asked)
    assert made.limits.max_num_tokens == built
    assert f"--max_num_tokens={built}" in " ".join(made.command).replace("tokens ", "tokens=")


def test_what_shapes_the_bytes_changes_the_key() -> None:
    """Where the build runs, and for how long, does not."""
    known = compiler().inputs(ADA)
    assert compiler(max_batch_size=5).inputs(ADA) != known
    assert compiler({"use_fused_mlp": False}).inputs(ADA) != known
    assert compiler(kv_cache_dtype="bfloat16").inputs(ADA) != known
    assert compiler(dtype="float16").inputs(ADA) != known
    assert compiler().inputs(dataclasses.replace(ADA, card="NVIDIA-L4")) != known
    assert compiler(where="local", timeout_s=1.0, memory_gib=2.0).inputs(ADA) == known
