"""Checkpoints that are damaged or of another kind: each its own message and exit code."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipeline.core.errors import CorruptError, ExitCode, RecipeError
from tests.architectures import tiny_architecture
from tests.formats.trtllm.convert.checkpoints import convert, edited
from tests.formats.trtllm.convert.conftest import Convert

if TYPE_CHECKING:
    from tests.formats.trtllm.convert.checkpoints import Tensors

_LAYER = "model.layers.1"


def _pop(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def _resize(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: tensors[name][:-1].contiguous()})


def _put(name: str, value: float) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: tensors[name] * 0 + value})


def _one(name: str, value: float) -> Callable[[Tensors], object]:
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


def _repeat(name: str, times: int) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: tensors[name].reshape(1).repeat(times)})


def _copy(name: str, copied: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({copied: tensors[name].clone()})


@pytest.mark.parametrize(
    ("edit", "shown"),
    [
        (_pop(f"{_LAYER}.mlp.up_proj.weight"), f"{_LAYER}.mlp.up_proj.weight is missing"),
        (_pop("lm_head.weight"), "lm_head.weight is missing"),
        (
            _pop(f"{_LAYER}.self_attn.q_proj.weight_scale"),
            f"{_LAYER}.self_attn.q_proj.weight_scale is missing; static per-tensor FP8 needs it",
        ),
        (
            _pop(f"{_LAYER}.mlp.down_proj.input_scale"),
            f"{_LAYER}.mlp.down_proj.input_scale is missing",
        ),
        (
            _resize(f"{_LAYER}.self_attn.v_proj.weight"),
            f"{_LAYER}.self_attn.v_proj.weight has the shape (31, 64), config.json implies",
        ),
        (
            _copy("model.norm.weight", f"{_LAYER}.self_attn.q_proj.bias"),
            f"{_LAYER}.self_attn.q_proj.bias is not known to the converters",
        ),
        (_put(f"{_LAYER}.mlp.down_proj.weight_scale", 0.0), "weight_scale is 0.0, no positive"),
        (_put(f"{_LAYER}.mlp.down_proj.input_scale", float("inf")), "input_scale is inf"),
        (_put(f"{_LAYER}.self_attn.k_proj.k_scale", float("nan")), "k_scale is nan"),
        (_one("model.norm.weight", float("nan")), "tensor model.norm.weight holds NaN or"),
        (_one("model.embed_tokens.weight", float("inf")), "model.embed_tokens.weight holds NaN"),
        (_one("lm_head.weight", float("-inf")), "tensor lm_head.weight holds NaN or infinite"),
        (_one(f"{_LAYER}.mlp.up_proj.weight", float("nan")), f"{_LAYER}.mlp.up_proj.weight holds"),
    ],
)
def test_damaged_tensor_is_named(
    llama: Path, tmp_path: Path, edit: Callable[[Tensors], object], shown: str
) -> None:
    broken = edited(llama, tmp_path / "broken", edit)
    with pytest.raises(CorruptError, match=re.escape(shown)) as refused:
        convert(broken, tmp_path / "converted")
    assert refused.value.exit_code == ExitCode.CORRUPT
    assert "make the checkpoint again" in str(refused.value)
    assert not list((tmp_path / "converted" / "stages").rglob("*.safetensors"))


def _half_fp8(tensors: Tensors) -> None:
    name = f"{_LAYER}.self_attn.k_proj"
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"].bfloat16()
    for kind in ("weight_scale", "input_scale"):
        del tensors[f"{name}.{kind}"]


def _as_bytes(tensors: Tensors) -> None:
    import torch

    name = f"{_LAYER}.mlp.down_proj.weight"
    tensors[name] = tensors[name].view(torch.uint8)


def _dynamic(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.endswith(".input_scale")]:
        del tensors[name]


def _fp8_head(tensors: Tensors) -> None:
    import torch

    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
    for kind in ("weight_scale", "input_scale"):
        tensors[f"lm_head.{kind}"] = torch.tensor(1.0)


@pytest.mark.parametrize(
    ("edit", "shown"),
    [
        (_half_fp8, "transformer.layers.1.attention.qkv: mixes precisions: .*k_proj is not FP8"),
        (_as_bytes, "down_proj.weight: has dtype uint8; .* is converted"),
        (_fp8_head, "lm_head.weight: has dtype float8_e4m3fn; .* is converted"),
        (
            _repeat(f"{_LAYER}.mlp.down_proj.weight_scale", 64),
            r"down_proj.weight_scale: has shape \(64,\); only one scale for a tensor",
        ),
        (_dynamic, "input_scale: is in no linear; only FP8 with static scales is converted"),
        (
            _put(f"{_LAYER}.self_attn.k_proj.weight_scale", 1e3),
            r"[qv]_proj.weight: has scale .* relative error of 1.00, at most 0.1 is allowed",
        ),
    ],
)
def test_another_kind_of_quantization_is_refused(
    llama: Path, tmp_path: Path, edit: Callable[[Tensors], object], shown: str
) -> None:
    other = edited(llama, tmp_path / "other", edit)
    with pytest.raises(RecipeError, match=shown) as refused:
        convert(other, tmp_path / "converted")
    assert refused.value.exit_code == ExitCode.USAGE


def test_model_without_fp8_is_refused(tmp_path: Path) -> None:
    plain = tiny_architecture("phi3", tmp_path / "plain")
    with pytest.raises(RecipeError, match="holds no FP8 linear; quantize the model first"):
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
    loud = edited(llama, tmp_path / "loud", _put(name, value))
    assert convert(loud, tmp_path / "bfloat16").record["dtype"] == "bfloat16"
    with pytest.raises(RecipeError, match=r"beyond the range of float16; use bfloat16"):
        convert(loud, tmp_path / "converted", "float16", kv_fp8=False)


def test_tied_model_may_store_a_copy_of_its_embedding_and_nothing_else(
    converted: Convert, tmp_path: Path
) -> None:
    found = converted("llama3.2")
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"

    def copied(tensors: Tensors) -> None:
        tensors[head] = tensors[embedding].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = tensors[
            "model.norm.weight"
        ].clone()

    same = convert(edited(found.unified, tmp_path / "same", copied), tmp_path / "converted")
    name = "rank0.safetensors"
    assert (same.dir / name).read_bytes() == (found.dir / name).read_bytes()

    def changed(tensors: Tensors) -> None:
        tensors[head] = tensors[embedding] * 2

    other = edited(found.unified, tmp_path / "other", changed)
    with pytest.raises(CorruptError, match=f"{head} differs from {embedding}"):
        convert(other, tmp_path / "refused")
