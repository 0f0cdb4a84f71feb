from __future__ import annotations

from typing import Any

import pytest

from pipeline.shapes import ModelShape, shape_faults, shape_of_config

COMMON: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
TRANSFORMERS_4 = {
    **COMMON,
    "rope_theta": 5000.0,
    "rope_scaling": {"type": "llama3", "factor": 8.0},
}
TRANSFORMERS_5 = {**COMMON, "rope_parameters": {"rope_theta": 5000, "rope_type": "llama3"}}


@pytest.mark.parametrize("config", [TRANSFORMERS_4, TRANSFORMERS_5], ids=["v4", "v5"])
def test_rope_settings_are_read_in_both_spellings(config: dict[str, Any]) -> None:
    shape = ModelShape(**shape_of_config(config))
    assert (shape.rope_theta, shape.rope_type) == (5000.0, "llama3")


def test_absent_fields_take_the_defaults_of_transformers() -> None:
    config = {k: v for k, v in COMMON.items() if k != "num_key_value_heads"}
    found = shape_of_config(config)
    assert found["head_dim"] == 16
    assert found["num_key_value_heads"] == 4
    assert found["rope_theta"] == 10000.0
    assert found["rope_type"] == "default"
    assert found["attention_bias"] is False
    assert found["sliding_window"] is None


def test_stated_head_dim_wins_over_the_quotient() -> None:
    assert shape_of_config({**COMMON, "head_dim": 32})["head_dim"] == 32


def test_qwen2_has_attention_biases_though_its_config_does_not_say_so() -> None:
    assert shape_of_config({**COMMON, "architectures": ["Qwen2ForCausalLM"]})["attention_bias"]


@pytest.mark.parametrize(
    ("extra", "window"),
    [
        ({"sliding_window": 128}, 128),
        ({"sliding_window": 128, "use_sliding_window": True}, 128),
        ({"sliding_window": 128, "use_sliding_window": False}, None),
        ({"sliding_window": None}, None),
    ],
)
def test_sliding_window_counts_only_where_it_is_used(
    extra: dict[str, Any], window: int | None
) -> None:
    assert shape_of_config({**COMMON, **extra})["sliding_window"] == window


def test_equal_shape_has_no_fault() -> None:
    assert shape_faults(ModelShape(**shape_of_config(TRANSFORMERS_4)), TRANSFORMERS_5) == []


@pytest.mark.parametrize(
    ("change", "field", "planned", "found"),
    [
        ({"num_hidden_layers": 4}, "num_hidden_layers", "3", "4"),
        (
            {"architectures": ["Qwen2ForCausalLM"], "attention_bias": False},
            "architecture",
            "LlamaForCausalLM",
            "Qwen2ForCausalLM",
        ),
        ({"rope_theta": 9.0}, "rope_theta", "10000.0", "9.0"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings", "True", "False"),
        ({"sliding_window": 8}, "sliding_window", "None", "8"),
    ],
)
def test_a_difference_names_the_field_and_both_values(
    change: dict[str, Any], field: str, planned: str, found: str
) -> None:
    (fault,) = shape_faults(ModelShape(**shape_of_config(COMMON)), {**COMMON, **change})
    assert fault.path == f"shape.{field}"
    assert f"plans with {planned}, " in fault.message
    assert f"says {found};" in fault.message


def test_query_heads_must_be_a_multiple_of_key_value_heads() -> None:
    fields = {**shape_of_config(COMMON), "num_key_value_heads": 3}
    with pytest.raises(ValueError, match=r"num_attention_heads \(4\).*num_key_value_heads \(3\)"):
        ModelShape(**fields)


def test_params_of_the_tiny_model_match_a_count_by_hand() -> None:
    shape = ModelShape(**shape_of_config(COMMON))
    attention = 64 * 64 + 2 * 64 * 32 + 64 * 64
    layers = 3 * (attention + 3 * 64 * 128 + 2 * 64)
    assert shape.params == layers + 64 + 320 * 64
    assert shape.kv_bytes_per_token(2) == 2 * 3 * 2 * 16 * 2
