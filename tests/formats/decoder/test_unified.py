"""Reading checkpoints: bit for bit, or a clear refusal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import CorruptError, RecipeError
from pipeline.core.values import Checkpoint
from pipeline.formats.trtrtx.graph_writer import write_weights
from pipeline.quant.unified import UnifiedCheckpoint
from tests.formats.decoder.decoders import write_graph
from tests.quant.tiny_quantized import edited

Tensors = dict[str, Any]


def without_a_scale(tensors: Tensors) -> None:
    del tensors["model.layers.0.mlp.up_proj.weight_scale"]


def without_a_norm(tensors: Tensors) -> None:
    del tensors["model.norm.weight"]


def emptied(tensors: Tensors) -> None:
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"][:0]


def other_shape(tensors: Tensors) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:8].clone()


def with_a_bias(tensors: Tensors) -> None:
    tensors["model.layers.1.self_attn.o_proj.bias"] = tensors["model.norm.weight"].clone()


def with_a_smoothing_scale(tensors: Tensors) -> None:
    tensors["model.layers.1.mlp.up_proj.pre_quant_scale"] = tensors["model.norm.weight"].clone()


def scale_of_a_16_bit_linear(tensors: Tensors) -> None:
    tensors["model.layers.2.mlp.down_proj.input_scale"] = tensors[
        "model.layers.1.mlp.down_proj.input_scale"
    ].clone()


def fp8_embedding(tensors: Tensors) -> None:
    import torch

    name = "model.embed_tokens.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)


def packed_integers(tensors: Tensors) -> None:
    import torch

    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(128, 64, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (without_a_norm, "tensor model.norm.weight is missing"),
        (emptied, r"layers.0.mlp.up_proj.weight has the shape \(0, 64\), .* implies \(128, 64\)"),
        (other_shape, r"model.norm.weight has the shape \(8,\), config.json implies \(64,\)"),
        (with_a_bias, "layers.1.self_attn.o_proj.bias is not known to the converters"),
        (with_a_smoothing_scale, "layers.1.mlp.up_proj.pre_quant_scale is not known"),
        (scale_of_a_16_bit_linear, "layers.2.mlp.down_proj.input_scale is not known"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_tensor_that_would_be_misread_or_not_be_read_is_refused(
    fp8_checkpoint: Checkpoint,
    tmp_path: Path,
    change: Callable[[Tensors], None],
    shown: str,
) -> None:
    broken = edited(fp8_checkpoint.dir, tmp_path / "broken", change)
    with pytest.raises(CorruptError, match=shown) as refused:
        write_graph(broken, tmp_path / "graph")
    assert "does not hold the model of its config.json" in str(refused.value)


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (fp8_embedding, "model.embed_tokens.weight: has dtype float8_e4m3fn; .* is converted"),
        (packed_integers, "layers.0.mlp.up_proj.weight: has dtype uint8; .* is converted"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_another_dtype_is_another_format_and_no_damage(
    fp8_checkpoint: Checkpoint,
    tmp_path: Path,
    change: Callable[[Tensors], None],
    shown: str,
) -> None:
    with pytest.raises(RecipeError, match=shown):
        write_graph(edited(fp8_checkpoint.dir, tmp_path / "broken", change), tmp_path / "graph")


def scale_per_channel(tensors: Tensors) -> None:
    name = "model.layers.0.mlp.up_proj.weight_scale"
    tensors[name] = tensors[name].reshape(1).repeat(128)


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (without_a_scale, "tensor model.layers.0.mlp.up_proj.weight_scale is missing"),
        (scale_per_channel, "up_proj.weight_scale has 128 elements; wanted one"),
    ],
)
def test_scale_that_is_missing_or_per_channel_is_refused(
    fp8_checkpoint: Checkpoint, tmp_path: Path, change: Callable[[Tensors], None], shown: str
) -> None:
    broken = edited(fp8_checkpoint.dir, tmp_path / "broken", change)
    with pytest.raises(CorruptError, match=shown):
        write_graph(broken, tmp_path / "graph")


def test_tensors_that_change_nothing_are_accepted(plain_dir: Path, tmp_path: Path) -> None:
    def harmless(tensors: Tensors) -> None:
        import torch

        for layer in range(3):
            tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
            tensors[f"model.layers.{layer}.self_attn.k_proj.k_scale"] = torch.ones(())
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()  # tied

    folder = edited(plain_dir, tmp_path / "broken", harmless)
    before, after = (
        write_graph(model_dir, tmp_path / name)
        for model_dir, name in ((plain_dir, "before"), (folder, "after"))
    )
    assert after.read_bytes() == before.read_bytes()
    weights = [path.with_name("weights.bin").read_bytes() for path in (before, after)]
    assert weights[0] == weights[1]


def test_every_tensor_arrives_bit_for_bit(fp8_checkpoint: Checkpoint) -> None:
    import torch
    from safetensors.torch import load_file

    checkpoint = UnifiedCheckpoint(fp8_checkpoint.dir)
    (shard,) = fp8_checkpoint.dir.glob("*.safetensors")
    wanted = load_file(shard)
    assert checkpoint.tensors.keys() == wanted.keys()
    assert {"bfloat16", "float8_e4m3fn", "float32"} == {
        entry.dtype for entry in checkpoint.tensors.values()
    }
    for name, tensor in wanted.items():
        found = checkpoint.read(name)
        assert found.dtype.name == str(tensor.dtype).removeprefix("torch.")
        assert found.shape == tuple(tensor.shape)
        assert (
            found.tobytes() == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
        assert not found.flags.writeable


def test_weights_file_holds_every_tensor_aligned_and_unedited(
    fp8_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    checkpoint = UnifiedCheckpoint(fp8_checkpoint.dir)
    path = tmp_path / "weights.bin"
    slots = write_weights(checkpoint, path)
    assert slots.keys() == {name for name in checkpoint.tensors if not name.endswith("_scale")}
    data = path.read_bytes()
    end = 0
    for name, slot in slots.items():
        assert slot.offset % 4096 == 0
        assert slot.offset >= end  # no tensor lies on another
        end = slot.offset + slot.size_bytes
        assert data[slot.offset : end] == checkpoint.read(name).tobytes()
    assert len(data) == end
