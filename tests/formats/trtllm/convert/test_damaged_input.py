"""Checkpoints that are damaged or of another kind: each its own message and exit code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.core.errors import CorruptError, ExitCode, RecipeError
from tests.architectures import tiny_architecture
from tests.formats.trtllm.convert.checkpoints import convert
from tests.quant.tiny_quantized import Edit, Tensors, drop, edited, fill, repeat

_LAYER = "model.layers.1"


def _one(name: str, value: float) -> Edit:
    """The tensor with one element in its middle replaced."""
    import torch

    def edit(tensors: Tensors) -> None:
        flat = tensors[name].float().flatten()
        flat[flat.numel() // 2] = value
        changed = flat.to(tensors[name].dtype).reshape(tensors[name].shape)
        if tensors[name].dtype == torch.float8_e4m3fn and value != value:
            changed.view(torch.uint8).flatten()[flat.numel() // 2] = 0xFF
        tensors[name] = changed

    return edit


@pytest.mark.parametrize(
    ("edit", "shown"),
    [
        (
            drop(f"{_LAYER}.self_attn.q_proj.weight_scale"),
            f"{_LAYER}.self_attn.q_proj.weight_scale is missing; static per-tensor FP8 needs it",
        ),
        (
            drop(f"{_LAYER}.mlp.down_proj.input_scale"),
            f"{_LAYER}.mlp.down_proj.input_scale is missing",
        ),
        (fill(f"{_LAYER}.mlp.down_proj.weight_scale", 0.0), "weight_scale is 0.0, no positive"),
        (fill(f"{_LAYER}.mlp.down_proj.input_scale", float("inf")), "input_scale is inf"),
        (fill(f"{_LAYER}.self_attn.k_proj.k_scale", float("nan")), "k_scale is nan"),
        (_one("model.norm.weight", float("nan")), "tensor model.norm.weight holds NaN or"),
        (_one("model.embed_tokens.weight", float("inf")), "model.embed_tokens.weight holds NaN"),
        (_one(f"{_LAYER}.mlp.up_proj.weight", float("nan")), f"{_LAYER}.mlp.up_proj.weight holds"),
    ],
)
def test_damaged_tensor_is_named(llama: Path, tmp_path: Path, edit: Edit, shown: str) -> None:
    broken = edited(llama, tmp_path / "broken", edit)
    with pytest.raises(CorruptError, match=re.escape(shown)) as refused:
        convert(broken, tmp_path / "converted")
    assert refused.value.exit_code == ExitCode.CORRUPT
    assert "make the checkpoint again" in str(refused.value)
    assert not list((tmp_path / "converted" / "stages").rglob("*.safetensors"))


def _half_fp8(tensors: Tensors) -> None:
    name = f"{_LAYER}.self_attn.k_proj"
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"].bfloat16()
    drop(f"{name}.weight_scale", f"{name}.input_scale")(tensors)


def _dynamic(tensors: Tensors) -> None:
    drop(*[name for name in tensors if name.endswith(".input_scale")])(tensors)


@pytest.mark.parametrize(
    ("edit", "shown"),
    [
        (_half_fp8, "transformer.layers.1.attention.qkv: mixes precisions: .*k_proj is not FP8"),
        (
            repeat(f"{_LAYER}.mlp.down_proj.weight_scale", 64),
            r"down_proj.weight_scale: has shape \(64,\); only one scale for a tensor",
        ),
        (_dynamic, "input_scale: is in no linear; only FP8 with static scales is converted"),
        (
            fill(f"{_LAYER}.self_attn.k_proj.weight_scale", 1e3),
            r"[qv]_proj.weight: has scale .* relative error of 1.00, at most 0.1 is allowed",
        ),
    ],
)
def test_another_kind_of_quantization_is_refused(
    llama: Path, tmp_path: Path, edit: Edit, shown: str
) -> None:
    other = edited(llama, tmp_path / "other", edit)
    with pytest.raises(RecipeError, match=shown) as refused:
        convert(other, tmp_path / "converted")
    assert refused.value.exit_code == ExitCode.USAGE


def test_model_without_fp8_is_refused(tmp_path: Path) -> None:
    plain = tiny_architecture("phi3", tmp_path / "plain")
    with pytest.raises(RecipeError, match="16-bit linears and no FP8 linear; quantize"):
        convert(plain, tmp_path / "converted")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.norm.weight", 1e6),
        (f"{_LAYER}.mlp.down_proj.weight_scale", 1e-5),
        (f"{_LAYER}.mlp.down_proj.input_scale", 1e5),
    ],
)
def test_value_beyond_float16_is_refused(
    llama: Path, tmp_path: Path, name: str, value: float
) -> None:
    loud = edited(llama, tmp_path / "loud", fill(name, value))
    assert convert(loud, tmp_path / "bfloat16").record["dtype"] == "bfloat16"
    with pytest.raises(RecipeError, match=r"beyond the range of float16; use bfloat16"):
        convert(loud, tmp_path / "converted", "float16", kv_fp8=False)
