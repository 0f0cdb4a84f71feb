"""Configs are understood, key by key; whatever is not understood is refused by its name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config.compose import config_folders
from pipeline.config.load import load
from pipeline.core.errors import RecipeError
from pipeline.formats.spec import format_specs
from pipeline.model.read import IRRELEVANT, REQUIRED, read_spec, spec_faults
from pipeline.model.spec import Attention, Llama3Scaling, LongRopeScaling, Rope, rope_tables
from tests.architectures import ARCHITECTURES, tiny_architecture
from tests.specs import published, shape, spec_of_folder, tiny_config, tiny_spec


def llama3(factor: float) -> Llama3Scaling:
    return Llama3Scaling(
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )


Numbers = tuple[int, int, int, int, int, int | None, Rope]


# layers, query heads, key heads, head size, MLP width, window, rope
WANTED: dict[str, Numbers] = {
    "phi-3-mini-4k-instruct": (32, 32, 32, 96, 8192, 2047, Rope(theta=1e4, rotary_dim=96)),
    "mistral-7b-instruct-v0.3": (32, 32, 8, 128, 14336, None, Rope(theta=1e6, rotary_dim=128)),
    "qwen2.5-7b-instruct": (28, 28, 4, 128, 18944, None, Rope(theta=1e6, rotary_dim=128)),
    "qwen3-4b-instruct-2507": (36, 32, 8, 128, 9728, None, Rope(theta=5e6, rotary_dim=128)),
    "qwen3-8b": (36, 32, 8, 128, 12288, None, Rope(theta=1e6, rotary_dim=128)),
    "mistral-nemo-base-2407": (40, 32, 8, 128, 14336, None, Rope(theta=1e6, rotary_dim=128)),
    "qwen2.5-0.5b-instruct": (24, 14, 2, 64, 4864, None, Rope(theta=1e6, rotary_dim=64)),
    "llama-3.1-8b-instruct": (
        *(32, 32, 8, 128, 14336, None),
        Rope(theta=5e5, rotary_dim=128, scaling=llama3(8.0)),
    ),
    "llama-3.2-1b-instruct": (
        *(16, 32, 8, 64, 8192, None),
        Rope(theta=5e5, rotary_dim=64, scaling=llama3(32.0)),
    ),
    "smollm2-135m-instruct": (30, 9, 3, 64, 1536, None, Rope(theta=1e5, rotary_dim=64)),
}


TIED = {
    *("llama-3.2-1b-instruct", "smollm2-135m-instruct", "qwen2.5-0.5b-instruct"),
    "qwen3-4b-instruct-2507",
}


@pytest.mark.parametrize("name", WANTED)
def test_published_config_is_read_whole(name: str) -> None:
    spec, config = read_spec(published(name)), published(name)
    layers, heads, kv_heads, head_dim, inner, window, rope = WANTED[name]
    assert (spec.num_layers, spec.tied) == (layers, name in TIED)
    layer = spec.uniform_layer()
    assert layer.attention == Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        scale=1 / head_dim**0.5,
        rope=rope,
        window=window,
        qk_norm=name.startswith("qwen3"),
    )
    assert layer.linear("gate").rows == inner
    assert layer.linear("q").bias is name.startswith("qwen2")
    assert layer.fused_mlp is name.startswith("phi")
    assert spec.hidden_size == config["hidden_size"]
    assert spec.norm_eps == config["rms_norm_eps"]
    assert spec.max_position_embeddings == config["max_position_embeddings"]
    for each in format_specs().values():
        each.check_shape(spec)


def test_published_phi_4_mini_turns_three_quarters_of_a_head_with_longrope() -> None:
    spec = read_spec(published("phi-4-mini-instruct"))
    rope = spec.layers[0].attention.rope
    assert (spec.window, spec.short_rope_context, rope.rotary_dim) == (262144, 4096, 96)
    scaling = rope.scaling
    assert isinstance(scaling, LongRopeScaling)
    assert scaling.factors(4096) == (1.0,) * 48
    assert scaling.factors(4097)[::47] == (1.0, 47.77)
    # sqrt(1 + ln(131072 / 4096) / ln(4096)), to five digits
    assert scaling.attention_factor == pytest.approx(1.19024, abs=1e-5)


PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text())
"""Hub repository -> essentials of its config.json, and its parameters as its card or index has them
or the start of the sentence that refuses it."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_model_is_planned_in_every_format_or_refused_in_a_sentence(name: str) -> None:
    known = PUBLISHED[name]
    if "refused" in known:
        with pytest.raises(RecipeError) as refused:
            read_spec(known["config"])
        (fault,) = refused.value.faults
        assert str(fault).startswith(f"config.json: {known['refused']}")
        assert "; " in str(fault), "what to do"
    else:
        spec = read_spec(known["config"])
        assert spec.params == known["params"]
        for each in format_specs().values():
            each.check_shape(spec)


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        ("phi3", "phi-3-mini-4k-instruct"),
        ("mistral", "mistral-7b-instruct-v0.3"),
        ("phi4-mini", "phi-4-mini-instruct"),
        ("qwen2.5", "qwen2.5-7b-instruct"),
        ("qwen3-4b", "qwen3-4b-instruct-2507"),
        ("qwen3-8b", "qwen3-8b"),
        ("llama3.1", "llama-3.1-8b-instruct"),
        ("smollm2", "smollm2-135m-instruct"),
    ],
)
def test_published_config_is_what_its_recipe_plans_with(recipe: str, name: str) -> None:
    assert spec_faults(shape(recipe), published(name)) == []


def test_config_that_transformers_4_dumped_whole_is_read() -> None:
    """As some public copies of Mistral's config are: the base class's fields beside its own."""
    base = {**REQUIRED, **dict.fromkeys(IRRELEVANT, 0)}
    name = "mistral-7b-instruct-v0.3"
    assert read_spec(published(name, **base)) == read_spec(published(name))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tensors_and_parameters_are_those_that_transformers_saves(
    name: str, tmp_path: Path
) -> None:
    from safetensors import safe_open

    folder = tiny_architecture(name, tmp_path)
    spec = spec_of_folder(folder)
    with safe_open(folder / "model.safetensors", framework="np") as file:
        saved = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    assert spec.tensors() == saved
    stored = {f"{module}.weight": size for module, size in spec.modules.items()}
    assert stored == {key: size for key, size in saved.items() if "_proj.weight" in key}


def test_numbers_of_the_tiny_model_match_a_count_by_hand() -> None:
    spec = tiny_spec()
    attention = 64 * 64 + 2 * 64 * 32 + 64 * 64
    layers = 3 * (attention + 3 * 64 * 128 + 2 * 64)
    assert spec.params == layers + 64 + 320 * 64
    assert spec.params_read(batch=7) == spec.params + 7 * 64  # tied: lm_head is the table
    untied = tiny_spec(tie_word_embeddings=False)
    assert untied.params_read(batch=7) == spec.params_read(batch=7)
    assert spec.kv_bytes(5, 2) == 5 * 2 * 3 * 2 * 16 * 2


def test_absent_keys_take_the_defaults_of_transformers() -> None:
    spec = tiny_spec(num_key_value_heads=...)
    assert spec.layers[0].attention.kv_heads == 4
    assert spec.layers[0].attention.head_dim == 16
    assert spec.layers[0].attention.rope == Rope(theta=1e4, rotary_dim=16)
    assert tiny_spec(head_dim=32).layers[0].attention.head_dim == 32


QWEN = {"use_sliding_window": True, "sliding_window": 128}


@pytest.mark.parametrize(
    ("model_type", "extra", "windows"),
    [
        ("mistral", {}, [4096] * 3),
        ("mistral", {"sliding_window": None}, [None] * 3),
        ("phi3", {}, [None] * 3),
        ("phi3", {"sliding_window": 128}, [128] * 3),
        ("qwen2", {"sliding_window": 128}, [None] * 3),
        ("qwen2", {**QWEN, "use_sliding_window": False, "max_window_layers": 0}, [None] * 3),
        ("qwen2", QWEN, [None] * 3),  # Transformers: from layer 28 on, of 3
        ("qwen2", {**QWEN, "max_window_layers": 0}, [128] * 3),
        ("qwen2", {**QWEN, "max_window_layers": 2}, [None, None, 128]),
        ("qwen3", {**QWEN, "max_window_layers": 1}, [None, 128, 128]),
    ],
)
def test_windows_are_those_that_transformers_would_use(
    model_type: str, extra: dict[str, Any], windows: list[int | None]
) -> None:
    assert tiny_spec(model_type, **extra).windows == tuple(windows)


LLAMA3 = published("llama-3.1-8b-instruct")["rope_scaling"]


LLAMA, QWEN2, PHI4 = "llama-3.1-8b-instruct", "qwen2.5-7b-instruct", "phi-4-mini-instruct"


@pytest.mark.parametrize(
    ("name", "changes", "shown"),
    [
        (LLAMA, {"model_type": "gpt2"}, "model_type: is 'gpt2'; the model types that we"),
        (LLAMA, {"attention_bias": True}, "attention_bias: is True"),
        (LLAMA, {"num_key_value_heads": 5}, "num_key_value_heads: (5) does not divide"),
        (LLAMA, {"rope_theta": 0}, "rope_parameters.rope_theta: is 0; it must be a number > 0"),
        (LLAMA, {"rope_scaling": LLAMA3 | {"beta_fast": 32}}, "rope_parameters.beta_fast: is not"),
        (
            LLAMA,
            {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
            "rope_parameters.rope_type: 'dynamic' is none of default, linear, llama3, longrope,",
        ),
        (
            LLAMA,
            {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "llama3"}},
            "rope_parameters.rope_theta: is stated twice, as 10000.0 and as 500000.0",
        ),
        (LLAMA, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: is not known"),
        (QWEN2, {"layer_types": ["full_attention"] * 27}, "layer_types: differs from the windows"),
        (
            PHI4,
            {"partial_rotary_factor": 0.5},
            "rope_parameters.long_factor: longrope has 48 short and 48 long factors for 32",
        ),
        (
            "phi-3-mini-4k-instruct",
            {"partial_rotary_factor": 0.27},
            "rope_parameters.partial_rotary_factor: 0.27 of 96 is no even size",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_not_understood_is_refused_by_name(
    name: str, changes: dict[str, Any], shown: str
) -> None:
    with pytest.raises(RecipeError, match=re.escape(f"config.json: {shown}")) as refused:
        read_spec(published(name, **changes))
    assert len(refused.value.faults) == 1


def test_any_value_at_any_key_is_read_or_refused_with_a_message() -> None:
    rotten: tuple[Any, ...] = (None, 0, -1, 1.5, 10**30, float("inf"), "x", [], {}, [[]], True)
    for name in ("phi-4-mini-instruct", "qwen2.5-7b-instruct", "llama-3.1-8b-instruct"):
        config = published(name)
        for key in config:
            for value in rotten:
                try:
                    read_spec(config | {key: value})
                except RecipeError as error:
                    assert key in str(error) or "rope_parameters" in str(error)  # noqa: PT017
        for key in config.get("rope_scaling") or ():
            for value in rotten:
                try:
                    read_spec(config | {"rope_scaling": config["rope_scaling"] | {key: value}})
                except RecipeError as error:
                    assert str(error).startswith("config.json: rope_")  # noqa: PT017


def test_all_faults_of_a_config_are_reported_together() -> None:
    changes = {"attention_bias": True, "hidden_size": "wide", "logit_scale": 0.5, "rope_theta": -1}
    with pytest.raises(RecipeError) as refused:
        read_spec(published(LLAMA, **changes))
    assert len(refused.value.faults) == 4


def test_recipe_gets_every_fault_of_its_shape_at_its_key() -> None:
    overrides = ["shape.rms_norm_eps=-1", "shape.hidden_size=wide", "version=0"]
    job = load("smollm2", overrides, folders=config_folders(None))
    paths = [fault.path for fault in job.faults]
    assert {"shape.rms_norm_eps", "shape.hidden_size", "version"} <= set(paths)


def test_another_family_with_the_same_numbers_is_a_difference() -> None:
    paths = [fault.path for fault in spec_faults(tiny_spec(), tiny_config("phi3"))]
    assert paths[:2] == ["shape.model_type", "shape.architectures"]


CONFIGS = sorted((Path(__file__).parent / "configs").glob("*.json"))


def transformers_tables(config_json: dict[str, Any], positions: int) -> list[Any]:
    """Cosine and sine [positions, rotary_dim] of one forward pass over all these positions."""
    import torch
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    fields = dict(config_json)
    model_type = fields.pop("model_type")
    config = AutoConfig.for_model(model_type, **fields)
    kind = Phi3RotaryEmbedding if model_type == "phi3" else LlamaRotaryEmbedding
    return [
        table[0].numpy() for table in kind(config)(torch.zeros(1), torch.arange(positions)[None])
    ]


def assert_equal_tables(rope: Rope, wanted: list[Any], *, rows: slice, context: int) -> None:
    for table, reference in zip(rope_tables(rope, context=context), wanted, strict=True):
        assert table.dtype == np.float64
        assert table.shape == (context, rope.rotary_dim / 2)
        doubled = np.concatenate([table, table], axis=-1)[rows]
        # Transformers multiplies in float32: 8191 rad x 6e-8 is 5e-4.
        np.testing.assert_allclose(doubled, reference[rows], rtol=0, atol=8e-4)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_tables_of_published_configs_equal_transformers(path: Path) -> None:
    config = json.loads(path.read_text())
    rope = read_spec(config).layers[0].attention.rope
    for context in (4096, 8192):  # Phi-4-mini's original context, and one beyond it
        assert_equal_tables(
            rope,
            transformers_tables(config, context),
            rows=slice(0, context),
            context=context,
        )
