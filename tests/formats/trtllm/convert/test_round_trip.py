"""The proof: run by TensorRT-LLM's conventions, the converted checkpoint is the same model.

Both sides have their own code for everything: layout, rotary embedding, windows. And the proof can
fail: damaged in any one way, a converted checkpoint makes the reference fail as TensorRT-LLM would,
or its logits leave the bound.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from pipeline.core.cache import StageCache
from pipeline.formats.trtllm.convert import convert_trtllm
from tests.architectures import TRTLLM_ARCHITECTURES, WINDOW
from tests.formats.trtllm.conftest import Convert
from tests.formats.trtllm.convert.checkpoints import (
    Converted,
    convert,
    reconfigured,
    unified_checkpoint,
)
from tests.formats.trtllm.convert.reference import (
    LOGIT_BOUND,
    ROUNDED_BOUND,
    TrtLlmReference,
    largest_difference,
    relative_difference,
    transformers_logits,
)
from tests.quant.tiny_quantized import Edit, drop, edited, multiply

if TYPE_CHECKING:
    import torch

    from tests.formats.trtllm.convert.reference import Logits


def both(
    found: Converted, folder: Path | None = None, *, round_activations: bool = False
) -> tuple[Logits, Logits]:
    """Logits by TensorRT-LLM's conventions (of a changed `folder`), and by Transformers."""
    return (
        TrtLlmReference(
            folder or found.dir,
            round_activations=round_activations,
            window=found.record["attention_window"],
        ),
        transformers_logits(found.unified, round_activations=round_activations),
    )


@pytest.mark.parametrize("name", TRTLLM_ARCHITECTURES)
def test_logits_equal_transformers(converted: Convert, name: str) -> None:
    found = converted(name)
    assert largest_difference(*both(found)) < LOGIT_BOUND
    assert relative_difference(*both(found, round_activations=True)) < ROUNDED_BOUND


def test_linears_kept_in_16_bits_run_as_such(tmp_path: Path) -> None:
    kept = ("model.layers.1.mlp.*_proj", "model.layers.2.self_attn.?_proj")
    found = convert(unified_checkpoint(tmp_path, "llama", *kept), tmp_path / "converted")
    assert found.record["kept_16bit"] == [
        "lm_head",
        "transformer.layers.1.mlp.fc",
        "transformer.layers.1.mlp.gate",
        "transformer.layers.1.mlp.proj",
        "transformer.layers.2.attention.qkv",
        "transformer.layers.2.attention.dense",
    ]
    assert largest_difference(*both(found)) < LOGIT_BOUND


def test_head_size_other_than_hidden_over_heads_is_kept(tmp_path: Path) -> None:
    found = convert(unified_checkpoint(tmp_path, "llama", head_dim=24), tmp_path / "converted")
    assert largest_difference(*both(found)) < LOGIT_BOUND


@pytest.mark.parametrize(
    ("name", "window"),
    [("llama", None), ("mistral-sliding", WINDOW), ("phi3", WINDOW), ("phi3-long", None)],
)
def test_window_is_told_where_it_is_shorter_than_the_context(
    converted: Convert, name: str, window: int | None
) -> None:
    record = converted(name).record
    assert record["attention_window"] == window
    assert any("max_attention_window" in note for note in record["notes"]) == (window is not None)


@pytest.mark.parametrize(("name", "told"), [("qwen3", True), ("qwen2.5", False)])
def test_epsilon_that_tensorrt_llm_has_of_its_own_is_told(
    converted: Convert, name: str, told: bool
) -> None:
    notes = converted(name).record["notes"]
    assert any("add 1e-05 to the mean square, the model 1e-06" in note for note in notes) is told


def test_float16_checkpoint_holds_the_same_numbers(converted: Convert, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    found = converted("qwen2.5")
    half = load_file(
        convert(found.unified, tmp_path, "float16", kv_fp8=False).dir / "rank0.safetensors"
    )
    full = load_file(found.dir / "rank0.safetensors")
    assert full.keys() - half.keys() == {
        f"transformer.layers.{layer}.attention.kv_cache_scaling_factor" for layer in range(3)
    }
    for name, tensor in half.items():
        wanted: torch.Tensor = full[name]
        if str(wanted.dtype) == "torch.bfloat16":
            assert str(tensor.dtype) == "torch.float16"
            np.testing.assert_array_equal(tensor.numpy(), wanted.float().numpy().astype(np.float16))
        else:
            assert tensor.dtype == wanted.dtype
            assert tensor.float().equal(wanted.float())


def test_key_follows_checkpoint_and_types_and_the_bytes_follow_the_key(
    llama: Path, tmp_path: Path
) -> None:
    one, other = StageCache(root=tmp_path / "one"), StageCache(root=tmp_path / "other")
    made = [
        convert_trtllm(llama, "a" * 64, one, dtype="bfloat16", kv_fp8=True),
        convert_trtllm(llama, "b" * 64, one, dtype="bfloat16", kv_fp8=True),
        convert_trtllm(llama, "a" * 64, one, dtype="bfloat16", kv_fp8=False),
        convert_trtllm(llama, "a" * 64, one, dtype="float16", kv_fp8=True),
    ]
    assert len({result.key for result in made}) == 4
    again = convert_trtllm(llama, "a" * 64, other, dtype="bfloat16", kv_fp8=True)
    assert (again.key, again.digest) == (made[0].key, made[0].digest)


_LAYER = "transformer.layers.1"


_TENFOLD = 10 * LOGIT_BOUND


def passes(found: Converted, damaged: Path) -> bool:
    """Whether the round trip would accept the damaged checkpoint."""
    try:
        return largest_difference(*both(found, damaged)) < _TENFOLD
    except (RuntimeError, AssertionError, KeyError, TypeError, ValueError):
        return False


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("llama3.1", "rotary_base"),
        ("qwen2.5", "rotary_base"),
        ("llama3.1", "rotary_scaling"),
        ("phi4-mini", "rotary_pct"),
        ("llama", "position_embedding_type"),
        ("phi3-long", "position_embedding_type"),
        ("phi3-long", "longrope_scaling_long_factors"),
        ("phi4-mini", "original_max_position_embeddings"),
        ("llama", "num_key_value_heads"),
        ("qwen3", "head_size"),
        ("qwen3", "qwen_type"),
        ("llama", "intermediate_size"),
        ("phi3", "hidden_act"),
        ("llama", "vocab_size"),
        ("llama", "quantization"),
    ],
)
def test_key_that_is_left_out_is_noticed(
    converted: Convert, tmp_path: Path, name: str, key: str
) -> None:
    found = converted(name)
    damaged = reconfigured(found.dir, tmp_path / "damaged", lambda config: config.pop(key))
    assert not passes(found, damaged)


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("qwen2.5", multiply(f"{_LAYER}.attention.qkv.bias", 0.0)),
        ("qwen3", drop(f"{_LAYER}.attention.q_layernorm.weight")),
        ("qwen3", multiply(f"{_LAYER}.attention.k_layernorm.weight", 1.01)),
        ("llama", drop("lm_head.weight")),
        ("llama", drop(f"{_LAYER}.attention.kv_cache_scaling_factor")),
        ("llama", drop(f"{_LAYER}.mlp.proj.activation_scaling_factor")),
        ("llama", multiply(f"{_LAYER}.mlp.proj.weights_scaling_factor", 1.01)),
        ("llama", multiply(f"{_LAYER}.post_layernorm.weight", 1.01)),
    ],
)
def test_wrong_tensor_is_noticed(converted: Convert, tmp_path: Path, name: str, edit: Edit) -> None:
    found = converted(name)
    assert not passes(found, edited(found.dir, tmp_path / "damaged", edit))
