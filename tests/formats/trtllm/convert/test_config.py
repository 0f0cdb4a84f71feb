"""config.json: value by value, by the keys that TensorRT-LLM's classes read, and refusals.

`trtllm_config_keys.json` lists those keys.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import ExitCode, RecipeError
from pipeline.formats.trtllm.layout import trtllm_config
from pipeline.model.read import read_spec
from tests.architectures import TRTLLM_ARCHITECTURES
from tests.formats.trtllm.conftest import Convert
from tests.specs import published

LLAMA3 = published("llama-3.1-8b-instruct")


LLAMA = {**LLAMA3, "rope_scaling": None}


LONGROPE = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}


LONG = {"rope_scaling": LONGROPE, "original_max_position_embeddings": 4096}


PHI3 = published("phi-3-mini-4k-instruct", max_position_embeddings=131072, **LONG)


def made(config: dict[str, Any], **settings: Any) -> dict[str, Any]:
    given = {"dtype": "bfloat16", "kv_fp8": True, "exclude": ["lm_head"], **settings}
    return trtllm_config(read_spec(config), **given)


def test_llama3_config_key_by_key() -> None:
    assert made(LLAMA3) == {
        "architecture": "LlamaForCausalLM",
        "dtype": "bfloat16",
        "logits_dtype": "float32",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_size": 128,
        "qk_layernorm": False,
        "hidden_act": "silu",
        "norm_epsilon": 1e-5,
        "max_position_embeddings": 131072,
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": 500000.0,
        "rotary_pct": 1.0,
        "rotary_embedding_dim": 128,
        "rotary_scaling": {
            "type": "llama3",
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "attn_bias": False,
        "mlp_bias": False,
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1, "cp_size": 1},
        "quantization": {
            "quant_algo": "FP8",
            "kv_cache_quant_algo": "FP8",
            "exclude_modules": ["lm_head"],
        },
    }


def test_phi3_gates_with_one_fused_matrix_and_names_longrope_in_both_places() -> None:
    found = made(PHI3)
    assert found["hidden_act"] == "swiglu"
    assert found["position_embedding_type"] == "long_rope"
    assert found["longrope_scaling_short_factors"] == [1.0] * 48
    assert found["longrope_scaling_long_factors"] == [2.0] * 48
    assert found["original_max_position_embeddings"] == 4096
    assert found["rotary_scaling"] is None
    assert not {"attn_bias", "mlp_bias"} & found.keys()


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 100, 128, 256])
def test_rotary_pct_gives_the_rotated_size_for_every_share(head_dim: int) -> None:
    for rotary_dim in range(2, head_dim + 1, 2):
        share = {
            "partial_rotary_factor": (rotary_dim + 0.5) / head_dim if rotary_dim < head_dim else 1.0
        }
        config = published("phi-3-mini-4k-instruct", hidden_size=32 * head_dim, **share)
        assert int(head_dim * made(config)["rotary_pct"]) == rotary_dim


@pytest.mark.parametrize(
    ("config", "shown"),
    [
        (
            {**LLAMA, "partial_rotary_factor": 0.5},
            "partial_rotary_factor: rotates 64 of 128",
        ),
        (
            {**LLAMA, **LONG, "head_dim": 96},
            "rope_type: is longrope, which its LlamaForCausalLM does not have",
        ),
        (
            {**PHI3, "head_dim": 128, "rope_scaling": None},
            "head_dim: is 128; .* = 96 instead",
        ),
        (
            {
                **PHI3,
                "rope_scaling": LLAMA3["rope_scaling"],
                "original_max_position_embeddings": None,
            },
            "rope_type: is llama3, which its Phi3",
        ),
        (
            {**PHI3, "rope_scaling": {**LONGROPE, "attention_factor": 1.3}},
            "attention_factor: is 1.3; TensorRT-LLM computes 1.19024",
        ),
        (
            published("qwen2.5-7b-instruct", use_sliding_window=True, max_window_layers=14),
            "layer_types: mixes layers of different kinds",
        ),
    ],
)
def test_what_tensorrt_llm_would_ignore_is_refused(config: dict[str, Any], shown: str) -> None:
    with pytest.raises(RecipeError, match=shown) as refused:
        made(config)
    assert refused.value.exit_code == ExitCode.USAGE
    assert "use compiler=checkpoint" in str(refused.value)


KEYS = json.loads(Path(__file__).with_name("trtllm_config_keys.json").read_text())


CLASS = {
    "LlamaForCausalLM": "LLaMAConfig",
    "MistralForCausalLM": "LLaMAConfig",
    "Qwen2ForCausalLM": "QWenConfig",
    "Qwen3ForCausalLM": "QWenConfig",
    "Phi3ForCausalLM": "Phi3Config",
}
"""Source: `MODEL_MAP` in models/__init__.py of NVIDIA/TensorRT-LLM, index number 820782731."""


def read_keys(config: dict[str, Any]) -> set[str]:
    """Every key that TensorRT-LLM looks at for this architecture."""
    name = CLASS[config["architecture"]]
    return {
        *KEYS["classes"]["PretrainedConfig"],
        *KEYS["classes"][name],
        *KEYS["beside"]["all"],
        *KEYS["beside"].get(name, {}),
    }


def written(converted: Convert, name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((converted(name).dir / "config.json").read_text())
    return config


LONGROPE_KEYS = {
    "longrope_scaling_short_factors",
    "longrope_scaling_long_factors",
    "original_max_position_embeddings",
}


@pytest.mark.parametrize("name", TRTLLM_ARCHITECTURES)
def test_every_key_that_is_read_is_written_or_neutral(converted: Convert, name: str) -> None:
    config = written(converted, name)
    absent = set() if config["position_embedding_type"] == "long_rope" else LONGROPE_KEYS
    wanted = read_keys(config) - KEYS["neutral"].keys() - absent
    assert config.keys() == wanted


@pytest.mark.parametrize("name", TRTLLM_ARCHITECTURES)
@pytest.mark.parametrize(
    ("section", "class_name"), [("quantization", "QuantConfig"), ("mapping", "Mapping")]
)
def test_sections_have_no_unknown_key_and_leave_out_neutral_ones_only(
    converted: Convert, name: str, section: str, class_name: str
) -> None:
    known = set(KEYS["classes"][class_name])
    assert written(converted, name)[section].keys() == known - KEYS["neutral"].keys()
