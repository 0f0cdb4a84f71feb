"""The proof: run by TensorRT-LLM's conventions, the converted checkpoint is the same model.

Both sides have their own code for everything: layout, rotary embedding, windows.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from pipeline.core.cache import StageCache
from pipeline.formats.trtllm.convert import convert_trtllm
from tests.architectures import ARCHITECTURES, WINDOW
from tests.formats.trtllm.convert.checkpoints import convert, unified_checkpoint
from tests.formats.trtllm.convert.comparison import (
    LOGIT_BOUND,
    ROUNDED_BOUND,
    largest_difference,
    relative_difference,
    transformers_logits,
)
from tests.formats.trtllm.convert.conftest import Convert
from tests.formats.trtllm.convert.reference import TrtLlmReference

if TYPE_CHECKING:
    import torch


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_equal_transformers(converted: Convert, name: str) -> None:
    found = converted(name)
    window = found.record["attention_window"]
    ours = TrtLlmReference(found.dir, round_activations=False, window=window)
    theirs = transformers_logits(found.unified, round_activations=False)
    assert largest_difference(ours, theirs) < LOGIT_BOUND


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_with_rounded_activations_logits_agree_with_transformers(
    converted: Convert, name: str
) -> None:
    found = converted(name)
    window = found.record["attention_window"]
    ours = TrtLlmReference(found.dir, round_activations=True, window=window)
    theirs = transformers_logits(found.unified, round_activations=True)
    assert relative_difference(ours, theirs) < ROUNDED_BOUND


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
    ours = TrtLlmReference(found.dir, round_activations=False)
    theirs = transformers_logits(found.unified, round_activations=False)
    assert largest_difference(ours, theirs) < LOGIT_BOUND


def test_head_size_other_than_hidden_over_heads_is_kept(tmp_path: Path) -> None:
    found = convert(unified_checkpoint(tmp_path, "llama", head_dim=24), tmp_path / "converted")
    ours = TrtLlmReference(found.dir, round_activations=False)
    theirs = transformers_logits(found.unified, round_activations=False)
    assert largest_difference(ours, theirs) < LOGIT_BOUND


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
