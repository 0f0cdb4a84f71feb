from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.folders import config_folders
from pipeline.config.load import load
from pipeline.model.shapes import ModelShape, shape_faults, shape_of_config
from tests.architectures import ARCHITECTURES, ORIGINAL_CONTEXT, WINDOW, tiny_architecture

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


def qwen2(**extra: Any) -> dict[str, Any]:
    return {**COMMON, "architectures": ["Qwen2ForCausalLM"], "sliding_window": 128, **extra}


@pytest.mark.parametrize(
    ("config", "window"),
    [
        (qwen2(), None),
        (qwen2(use_sliding_window=False, max_window_layers=0), None),
        (qwen2(use_sliding_window=True), None),  # Transformers: from layer 28 on, of 3
        (qwen2(use_sliding_window=True, max_window_layers=3), None),
        (qwen2(use_sliding_window=True, max_window_layers=0), 128),
        ({**COMMON, "architectures": ["MistralForCausalLM"]}, 4096),
        ({**COMMON, "architectures": ["MistralForCausalLM"], "sliding_window": None}, None),
        ({**COMMON, "architectures": ["Phi3ForCausalLM"]}, None),
    ],
)
def test_sliding_window_is_the_one_that_transformers_would_use(
    config: dict[str, Any], window: int | None
) -> None:
    assert shape_of_config(config)["sliding_window"] == window


LONGROPE_4 = {
    **COMMON,
    "architectures": ["Phi3ForCausalLM"],
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
}
LONGROPE_5 = {
    **COMMON,
    "architectures": ["Phi3ForCausalLM"],
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
    },
}


@pytest.mark.parametrize("config", [LONGROPE_4, LONGROPE_5], ids=["v4", "v5"])
def test_longrope_tells_up_to_where_its_short_factors_hold(config: dict[str, Any]) -> None:
    shape = ModelShape(**shape_of_config(config))
    assert (shape.rope_type, shape.original_max_position_embeddings) == ("longrope", 64)
    assert shape.max_position_embeddings == 256


def test_original_context_counts_for_longrope_only() -> None:
    llama3 = {**TRANSFORMERS_4["rope_scaling"], "original_max_position_embeddings": 64}
    plain = {**COMMON, "original_max_position_embeddings": 256, "rope_scaling": None}
    for config in ({**TRANSFORMERS_4, "rope_scaling": llama3}, plain):
        assert shape_of_config(config)["original_max_position_embeddings"] is None


@pytest.mark.parametrize("kind", ["su", "yarn", "linear", "dynamic"])
def test_rope_that_we_do_not_build_is_refused_by_name(kind: str) -> None:
    fields = shape_of_config({**COMMON, "rope_scaling": {"type": kind, "factor": 2.0}})
    with pytest.raises(ValueError, match=r"rope_type\n.*'default', 'llama3' or 'longrope'"):
        ModelShape(**fields)


def test_recipe_with_such_a_rope_is_told_what_is_allowed() -> None:
    (job,) = load("smollm2", ["shape.rope_type=yarn"], folders=config_folders(None)).jobs
    (fault,) = job.faults
    assert fault.path == "shape.rope_type"
    assert fault.message.startswith("got \"yarn\", wanted 'default', 'llama3' or 'longrope'")


def as_transformers_4(config: dict[str, Any]) -> dict[str, Any]:
    """A config of Transformers 5 as the Hub's older ones are spelt."""
    old = {key: value for key, value in config.items() if key not in {"layer_types", "dtype"}}
    rope = old.pop("rope_parameters")
    old["rope_theta"] = rope.pop("rope_theta")
    if (partial := rope.pop("partial_rotary_factor", 1.0)) != 1.0:
        old["partial_rotary_factor"] = partial
    kind = rope.pop("rope_type")
    old["rope_scaling"] = None if kind == "default" else {**rope, "type": kind}
    if old["architectures"] == ["Qwen2ForCausalLM"] and not old["use_sliding_window"]:
        old["sliding_window"] = 4096  # they carry the number although it is off
    return old


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_both_spellings_of_every_tiny_model_give_the_same_shape(name: str, tmp_path: Path) -> None:
    folder = tiny_architecture(name, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    if "rope_parameters" not in config:
        pytest.skip("Transformers 4 is installed, which writes the other spelling")
    shape = ModelShape(**shape_of_config(config))
    assert shape_faults(shape, as_transformers_4(copy.deepcopy(config))) == []
    assert shape.tie_word_embeddings == (name in {"llama3.2", "qwen2.5-0.5b", "phi4-mini"})
    assert shape.attention_bias == name.startswith("qwen2.5")
    assert shape.original_max_position_embeddings == (
        ORIGINAL_CONTEXT if name in {"phi3-long", "phi4-mini"} else None
    )
    if name in {"mistral-sliding", "phi3"}:
        assert shape.sliding_window == WINDOW


def test_numbers_that_are_not_there_are_none_and_never_a_crash() -> None:
    found = shape_of_config({"architectures": ["LlamaForCausalLM"], "hidden_size": None})
    assert found["num_hidden_layers"] is None
    assert found["head_dim"] == 0


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
