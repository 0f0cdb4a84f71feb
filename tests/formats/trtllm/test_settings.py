"""Settings that TensorRT-LLM would change in silence, or refuse after minutes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from pipeline.core.data import shipped as shipped_option
from pipeline.core.errors import RecipeError
from pipeline.formats.trtllm.command import Plugins
from pipeline.formats.trtllm.compiler import TrtLlmCompiler
from tests.formats.trtllm.fakes import bare_machine
from tests.formats.trtllm.settings import compiler
from tests.quant.tiny_quantized import ADA


@pytest.fixture(scope="module")
def shipped() -> TrtLlmCompiler:
    settings = shipped_option("compiler/trtllm")
    settings.pop("defaults", None)
    return TrtLlmCompiler(**{**settings, "plugins": Plugins(**settings["plugins"])})


def test_shipped_settings_are_for_ada_and_fp8(shipped: TrtLlmCompiler) -> None:
    assert shipped.plugins.sm_fault(89) is None
    assert shipped.plugins.effective("fp8") == {
        "gemm_plugin": None,
        "gemm_swiglu_plugin": None,
        "low_latency_gemm_plugin": None,
        "low_latency_gemm_swiglu_plugin": None,
        "context_fmha": True,
        "remove_input_padding": True,
        "use_fused_mlp": True,
        "use_paged_context_fmha": True,
        "use_fp8_context_fmha": True,
        "multiple_profiles": True,
        "tokens_per_block": 32,
    }


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
        ({}, {"opt_num_tokens": 8}, r"opt_num_tokens \(8\) does not go with plugins.multiple"),
        (
            {"multiple_profiles": False},
            {"opt_num_tokens": 257},
            r"opt_num_tokens \(257\) must be <= max_num_tokens \(256\)",
        ),
        (
            {"use_fp8_context_fmha": False},
            {},
            r"use_fp8_context_fmha \(false\) does not go with .* kv_cache_dtype fp8",
        ),
        (
            {"use_fp8_context_fmha": True},
            {"kv_cache_dtype": "bfloat16"},
            r"use_fp8_context_fmha \(true\) does not go with .* kv_cache_dtype bfloat16",
        ),
        ({"use_fused_mlp": False, "gemm_swiglu_plugin": "fp8"}, {}, "needs use_fused_mlp"),
        (
            {"use_fused_mlp": False, "low_latency_gemm_swiglu_plugin": "fp8"},
            {},
            "needs use_fused_mlp",
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


def test_without_a_paged_context_fp8_attention_is_free_to_choose() -> None:
    plugins = {"use_paged_context_fmha": False, "use_fp8_context_fmha": True}
    built = compiler(plugins, kv_cache_dtype="bfloat16")
    assert built.plugins.effective("bfloat16")["use_fp8_context_fmha"] is True


@pytest.mark.parametrize(
    "plugin",
    ["gemm_swiglu_plugin", "low_latency_gemm_plugin", "low_latency_gemm_swiglu_plugin"],
)
def test_plugin_for_hopper_is_refused_on_ada_before_anything_else(
    plugin: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare_machine(tmp_path, monkeypatch)
    with pytest.raises(RecipeError, match=rf"plugins\.{plugin} is for Hopper .* is sm_89"):
        compiler({plugin: "fp8"}).check_machine(ADA)
    assert compiler({plugin: "fp8"}).plugins.sm_fault(90) is None


def test_what_shapes_the_bytes_changes_the_key() -> None:
    """Where the build runs, and for how long, does not."""
    known = compiler().inputs(ADA)
    assert compiler(max_batch_size=5).inputs(ADA) != known
    assert compiler({"use_fused_mlp": False}).inputs(ADA) != known
    assert compiler(kv_cache_dtype="bfloat16").inputs(ADA) != known
    assert compiler(dtype="float16").inputs(ADA) != known
    assert compiler().inputs(dataclasses.replace(ADA, card="NVIDIA-L4")) != known
    assert compiler(where="local", timeout_s=1.0, memory_gib=2.0).inputs(ADA) == known
