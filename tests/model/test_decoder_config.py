"""Published configs are understood, key by key; whatever is not understood is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.core.errors import RecipeError
from pipeline.model.decoder_config import DecoderConfig
from pipeline.model.rope import Llama3Scaling, LongRopeScaling, Rope
from pipeline.model.shapes import ModelShape, shape_faults
from tests.architectures import ARCHITECTURES, tiny_architecture

CONFIGS = Path(__file__).parent / "configs"
SHAPES = Path(__file__).parents[2] / "recipes" / "shapes"


def published(name: str) -> dict[str, Any]:
    """A public config.json, keys and values as its repository has them."""
    config: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text())
    return config


def llama3(factor: float) -> Llama3Scaling:
    return Llama3Scaling(
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )


WANTED: dict[str, DecoderConfig] = {
    "phi-3-mini-4k-instruct": DecoderConfig(
        architecture="Phi3ForCausalLM",
        hidden_size=3072,
        intermediate_size=8192,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=96,
        vocab_size=32064,
        rms_norm_eps=1e-5,
        rope=Rope(theta=10000.0, rotary_dim=96),
        max_position_embeddings=4096,
        sliding_window=2047,
        attention_bias=False,
        tied=False,
    ),
    "mistral-7b-instruct-v0.3": DecoderConfig(
        architecture="MistralForCausalLM",
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=32768,
        rms_norm_eps=1e-5,
        rope=Rope(theta=1e6, rotary_dim=128),
        max_position_embeddings=32768,
        sliding_window=None,
        attention_bias=False,
        tied=False,
    ),
    "qwen2.5-7b-instruct": DecoderConfig(
        architecture="Qwen2ForCausalLM",
        hidden_size=3584,
        intermediate_size=18944,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        vocab_size=152064,
        rms_norm_eps=1e-6,
        rope=Rope(theta=1e6, rotary_dim=128),
        max_position_embeddings=32768,
        sliding_window=None,  # use_sliding_window is false
        attention_bias=True,
        tied=False,
    ),
    "qwen2.5-0.5b-instruct": DecoderConfig(
        architecture="Qwen2ForCausalLM",
        hidden_size=896,
        intermediate_size=4864,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
        head_dim=64,
        vocab_size=151936,
        rms_norm_eps=1e-6,
        rope=Rope(theta=1e6, rotary_dim=64),
        max_position_embeddings=32768,
        sliding_window=None,
        attention_bias=True,
        tied=True,
    ),
    "llama-3.1-8b-instruct": DecoderConfig(
        architecture="LlamaForCausalLM",
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=128256,
        rms_norm_eps=1e-5,
        rope=Rope(theta=5e5, rotary_dim=128, scaling=llama3(8.0)),
        max_position_embeddings=131072,
        sliding_window=None,
        attention_bias=False,
        tied=False,
    ),
    "llama-3.2-1b-instruct": DecoderConfig(
        architecture="LlamaForCausalLM",
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        vocab_size=128256,
        rms_norm_eps=1e-5,
        rope=Rope(theta=5e5, rotary_dim=64, scaling=llama3(32.0)),
        max_position_embeddings=131072,
        sliding_window=None,
        attention_bias=False,
        tied=True,
    ),
    "smollm2-135m-instruct": DecoderConfig(
        architecture="LlamaForCausalLM",
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        vocab_size=49152,
        rms_norm_eps=1e-5,
        rope=Rope(theta=1e5, rotary_dim=64),
        max_position_embeddings=8192,
        sliding_window=None,
        attention_bias=False,
        tied=True,
    ),
}


@pytest.mark.parametrize("name", WANTED)
def test_published_config_is_read_whole(name: str) -> None:
    assert DecoderConfig.from_json(published(name)) == WANTED[name]


def test_published_phi_4_mini_turns_three_quarters_of_a_head_with_longrope() -> None:
    config = DecoderConfig.from_json(published("phi-4-mini-instruct"))
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (24, 8, 128)
    assert (config.fused, config.tied, config.sliding_window) == (True, True, 262144)
    assert (config.rope.kind, config.rope.theta, config.rope.rotary_dim) == ("longrope", 1e4, 96)
    scaling = config.rope.scaling
    assert isinstance(scaling, LongRopeScaling)
    assert scaling.factors(4096) == (1.0,) * 48
    assert scaling.factors(4097)[::47] == (1.0, 47.77)
    # sqrt(1 + ln(131072 / 4096) / ln(4096)), to five digits
    assert scaling.attention_factor == pytest.approx(1.19024, abs=1e-5)


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        ("phi3", "phi-3-mini-4k-instruct"),
        ("mistral", "mistral-7b-instruct-v0.3"),
        ("qwen2.5", "qwen2.5-7b-instruct"),
        ("llama3.1", "llama-3.1-8b-instruct"),
        ("smollm2", "smollm2-135m-instruct"),
    ],
)
def test_published_config_has_the_shape_that_its_recipe_plans_with(recipe: str, name: str) -> None:
    fields = yaml.safe_load((SHAPES / f"{recipe}.yaml").read_text())
    fields.pop("_target_")
    assert shape_faults(ModelShape(**fields), published(name)) == []


def test_config_that_transformers_4_dumped_whole_is_read() -> None:
    """As some public copies of Mistral's config are: the base class's fields beside its own."""
    base: dict[str, Any] = {
        "add_cross_attention": False,
        "chunk_size_feed_forward": 0,
        "do_sample": False,
        "is_decoder": False,
        "is_encoder_decoder": False,
        "max_length": 20,
        "num_beams": 1,
        "pruned_heads": {},
        "tie_encoder_decoder": False,
        "tokenizer_class": None,
        "unk_token_id": 0,
        "torchscript": False,
        "use_bfloat16": False,
    }
    config = published("mistral-7b-instruct-v0.3")
    assert DecoderConfig.from_json(config | base) == WANTED["mistral-7b-instruct-v0.3"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tensor_shapes_are_those_that_transformers_saves(name: str, tmp_path: Path) -> None:
    from safetensors import safe_open

    folder = tiny_architecture(name, tmp_path)
    config = DecoderConfig.from_json(json.loads((folder / "config.json").read_text()))
    with safe_open(folder / "model.safetensors", framework="np") as file:
        saved = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    assert config.tensor_shapes() == saved


def test_cache_of_a_token_holds_keys_and_values_of_all_layers() -> None:
    config = WANTED["llama-3.1-8b-instruct"]
    assert config.kv_bytes_per_token(1) == 64 * 1024
    assert config.kv_bytes_per_token(2) == 128 * 1024


def longrope(**changes: Any) -> dict[str, Any]:
    return {"rope_scaling": published("phi-4-mini-instruct")["rope_scaling"] | changes}


LLAMA3 = {"rope_scaling": published("llama-3.1-8b-instruct")["rope_scaling"]}


@pytest.mark.parametrize(
    ("name", "changes", "shown"),
    [
        ("llama-3.1-8b-instruct", {"architectures": ["GPT2LMHeadModel"]}, "architectures: is 'GPT"),
        ("llama-3.1-8b-instruct", {"architectures": []}, "architectures: is None"),
        ("llama-3.1-8b-instruct", {"attention_bias": True}, "attention_bias: is true"),
        ("llama-3.1-8b-instruct", {"mlp_bias": True}, "mlp_bias: is True"),
        ("llama-3.1-8b-instruct", {"hidden_act": "gelu"}, "hidden_act: is 'gelu'"),
        ("llama-3.1-8b-instruct", {"pretraining_tp": 2}, "pretraining_tp: is 2"),
        ("llama-3.1-8b-instruct", {"num_key_value_heads": 5}, "num_key_value_heads: does not"),
        ("llama-3.1-8b-instruct", {"rope_interleaved": True}, "rope_interleaved: is True"),
        ("llama-3.1-8b-instruct", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: is n"),
        ("llama-3.1-8b-instruct", {"query_pre_attn_scalar": 1}, "query_pre_attn_scalar: is not"),
        (
            "llama-3.1-8b-instruct",
            {"rope_scaling": {**LLAMA3["rope_scaling"], "beta_fast": 32}},
            "rope_scaling.beta_fast: is not known",
        ),
        (
            "llama-3.1-8b-instruct",
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "rope_parameters: lacks low_freq_factor",
        ),
        (
            "llama-3.1-8b-instruct",
            {"rope_scaling": {**LLAMA3["rope_scaling"], "low_freq_factor": 4.0}},
            "rope_parameters: llama3 wants low_freq_factor (4.0) below",
        ),
        (
            "llama-3.1-8b-instruct",
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "rope_parameters: rope_type 'yarn'",
        ),
        (
            "llama-3.1-8b-instruct",
            {"rope_scaling": {**LLAMA3["rope_scaling"], "type": "linear"}},
            "rope_parameters: type is 'linear', rope_type is 'llama3'",
        ),
        (
            "llama-3.1-8b-instruct",
            {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "llama3"}},
            "rope_parameters: rope_theta is stated twice, as 10000.0 and as 500000.0",
        ),
        ("mistral-7b-instruct-v0.3", {"num_key_value_heads": ...}, "num_key_value_heads: is mis"),
        ("qwen2.5-7b-instruct", {"attention_bias": False}, "attention_bias: is false; Qwen2"),
        (
            "qwen2.5-7b-instruct",
            {"use_sliding_window": True, "max_window_layers": 14},
            "max_window_layers: mixes",
        ),
        (
            "qwen2.5-7b-instruct",
            {"layer_types": ["full_attention"] * 27 + ["sliding_attention"]},
            "layer_types: is ['full_attention', 'sliding_attention']",
        ),
        ("qwen2.5-7b-instruct", {"use_mrope": True}, "use_mrope: is True"),
        ("phi-4-mini-instruct", {"full_attn_mod": 2}, "full_attn_mod: is 2"),
        ("phi-4-mini-instruct", {"lm_head_bias": True}, "lm_head_bias: is True"),
        (
            "phi-4-mini-instruct",
            {"partial_rotary_factor": 0.5},
            "rope_parameters: longrope has 48 short and 48 long factors for 32",
        ),
        (
            "phi-4-mini-instruct",
            longrope(partial_rotary_factor=0.5),
            "rope_parameters: partial_rotary_factor is stated twice, as 0.5 and as 0.75",
        ),
        (
            "phi-4-mini-instruct",
            longrope(short_mscale=1.1),
            "rope_scaling.short_mscale: is not known",
        ),
        (
            "phi-4-mini-instruct",
            {"original_max_position_embeddings": ...},
            "rope_parameters: lacks original_max_position_embeddings",
        ),
        (
            "phi-3-mini-4k-instruct",
            {"partial_rotary_factor": 0.27},
            "rope_parameters: partial_rotary_factor 0.27 of 96",
        ),
        ("phi-3-mini-4k-instruct", {"rms_norm_eps": ...}, "rms_norm_eps: is missing"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_not_understood_is_refused_by_name(
    name: str, changes: dict[str, Any], shown: str
) -> None:
    config = published(name) | changes
    config = {key: value for key, value in config.items() if value is not ...}
    with pytest.raises(RecipeError, match=re.escape(f"config.json: {shown}")) as refused:
        DecoderConfig.from_json(config)
    assert len(refused.value.faults) == 1


def test_window_that_transformers_takes_when_the_config_is_silent_is_taken() -> None:
    config = published("mistral-7b-instruct-v0.3")
    del config["sliding_window"]
    assert DecoderConfig.from_json(config).sliding_window == 4096


def test_all_faults_of_a_config_are_reported_together() -> None:
    changes = {"attention_bias": True, "mlp_bias": True, "logit_scale": 0.5}
    with pytest.raises(RecipeError) as refused:
        DecoderConfig.from_json(published("llama-3.1-8b-instruct") | changes)
    assert len(refused.value.faults) == 3


def test_both_spellings_of_rope_are_one_config() -> None:
    config = published("phi-4-mini-instruct")
    new = {key: value for key, value in config.items() if key != "rope_scaling"}
    new["rope_parameters"] = {
        **config["rope_scaling"],
        "rope_type": "longrope",
        "rope_theta": new.pop("rope_theta"),
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 4096,
    }
    assert DecoderConfig.from_json(new) == DecoderConfig.from_json(config)
