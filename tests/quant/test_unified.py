"""Reading checkpoints: bit for bit, or a clear refusal."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.core.errors import CorruptError, RecipeError
from pipeline.core.values import Checkpoint
from pipeline.formats.trtrtx.graph_writer import write_weights
from pipeline.quant.unified import UnifiedCheckpoint
from tests.formats.decoder.decoders import write_graph
from tests.quant.tiny_quantized import (
    Edit,
    Tensors,
    copy,
    drop,
    edited,
    repeat,
    shorten,
    tiny_checkpoint,
)

UP, NORM = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
LAYER_1, KEPT = "model.layers.1", "model.layers.2.mlp.down_proj"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("fp8"), KEPT)


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (drop(NORM), "tensor model.norm.weight is missing"),
        (shorten(UP, 0), r"mlp.up_proj.weight has the shape \(0, 64\), .* implies \(128, 64\)"),
        (shorten(NORM, 8), r"norm.weight has the shape \(8,\), config.json implies \(64,\)"),
        (copy(NORM, f"{LAYER_1}.self_attn.o_proj.bias"), "o_proj.bias is not known to the conv"),
        (copy(NORM, f"{LAYER_1}.mlp.up_proj.pre_quant_scale"), "pre_quant_scale is not known"),
        (copy(f"{UP}_scale", f"{KEPT}.input_scale"), "2.mlp.down_proj.input_scale is not known"),
        (copy("model.embed_tokens.weight", "lm_head.weight"), None),  # tied
        (copy(NORM, "model.layers.0.self_attn.rotary_emb.inv_freq"), None),
    ],
)
def test_tensor_that_would_be_misread_or_not_be_read_is_refused(
    checkpoint: Checkpoint, tmp_path: Path, change: Edit, shown: str | None
) -> None:
    other = UnifiedCheckpoint(edited(checkpoint.dir, tmp_path / "other", change))
    if shown is None:
        return other.check_tensors()
    with pytest.raises(CorruptError, match=shown) as refused:
        other.check_tensors()
    assert "does not hold the model of its config.json" in str(refused.value)
    return None


def test_lm_head_of_a_tied_model_must_be_its_embedding(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    def another(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2

    other = UnifiedCheckpoint(edited(checkpoint.dir, tmp_path / "other", another))
    with pytest.raises(CorruptError, match=r"lm_head.weight differs from model.embed_tokens"):
        other.check_tensors()


@pytest.mark.parametrize(
    ("name", "dtype"), [("model.embed_tokens.weight", "float8_e4m3fn"), (UP, "uint8")]
)
def test_another_dtype_is_another_format_and_no_damage(
    checkpoint: Checkpoint, tmp_path: Path, name: str, dtype: str
) -> None:
    import torch

    def cast(tensors: Tensors) -> None:
        tensors[name] = tensors[name].float().to(getattr(torch, dtype))

    other = UnifiedCheckpoint(edited(checkpoint.dir, tmp_path / "other", cast))
    with pytest.raises(RecipeError, match=f"{name}: has dtype {dtype}; .* is converted"):
        other.check_tensors()


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (drop(f"{UP}_scale"), "tensor model.layers.0.mlp.up_proj.weight_scale is missing"),
        (repeat(f"{UP}_scale", 128), "up_proj.weight_scale has 128 elements; wanted one"),
    ],
)
def test_scale_that_is_missing_or_per_channel_is_refused_by_the_graph(
    checkpoint: Checkpoint, tmp_path: Path, change: Edit, shown: str
) -> None:
    broken = edited(checkpoint.dir, tmp_path / "broken", change)
    with pytest.raises(CorruptError, match=shown):
        write_graph(broken, tmp_path / "graph")


def test_every_tensor_arrives_bit_for_bit(checkpoint: Checkpoint) -> None:
    import torch
    from safetensors.torch import load_file

    opened = UnifiedCheckpoint(checkpoint.dir)
    (shard,) = checkpoint.dir.glob("*.safetensors")
    wanted = load_file(shard)
    assert opened.tensors.keys() == wanted.keys()
    assert {"bfloat16", "float8_e4m3fn", "float32"} == {
        entry.dtype for entry in opened.tensors.values()
    }
    for name, tensor in wanted.items():
        found = opened.read(name)
        assert found.dtype.name == str(tensor.dtype).removeprefix("torch.")
        assert found.shape == tuple(tensor.shape)
        assert (
            found.tobytes() == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
        assert not found.flags.writeable


def test_weights_file_holds_every_tensor_aligned_and_unedited(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    opened = UnifiedCheckpoint(checkpoint.dir)
    path = tmp_path / "weights.bin"
    slots = write_weights(opened, path)
    assert slots.keys() == {name for name in opened.tensors if not name.endswith("_scale")}
    data = path.read_bytes()
    end = 0
    for name, slot in slots.items():
        assert slot.offset % 4096 == 0
        assert slot.offset >= end  # no tensor lies on another
        end = slot.offset + slot.size_bytes
        assert data[slot.offset : end] == opened.read(name).tobytes()
    assert len(data) == end
