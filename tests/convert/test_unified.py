"""Reading checkpoints: bit for bit, or a clear refusal."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.convert.graph_writer import write_weights
from pipeline.convert.rope import rope_tables
from pipeline.convert.unified import UnifiedCheckpoint
from pipeline.errors import CorruptError, RecipeError
from pipeline.stages import Checkpoint
from tests.convert.decoders import write_graph


@pytest.fixture
def folder(plain_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to break."""
    return Path(shutil.copytree(plain_dir, tmp_path / "model"))


def rewrite(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"architectures": ["Phi3ForCausalLM"]}, "architectures: is 'Phi3ForCausalLM'"),
        ({"architectures": []}, "architectures: is None"),
        ({"attention_bias": True}, "attention_bias: is True"),
        ({"mlp_bias": True}, "mlp_bias: is True"),
        ({"sliding_window": 4096}, "sliding_window: is 4096"),
        ({"hidden_act": "gelu"}, "hidden_act: is 'gelu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: is 0.5"),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}},
            "rope_type: is 'llama3'",
        ),
    ],
    ids=str,
)
def test_config_that_the_graph_does_not_build_is_refused(
    folder: Path, changes: dict[str, Any], shown: str
) -> None:
    with pytest.raises(RecipeError, match=re.escape(f"config.json: {shown}")) as refused:
        write_graph(rewrite(folder, **changes), folder / "graph")
    assert len(refused.value.faults) == 1
    assert "the decoder graph supports" in str(refused.value)


def test_all_faults_of_a_config_are_reported_together(folder: Path) -> None:
    rewrite(folder, attention_bias=True, mlp_bias=True, sliding_window=8)
    with pytest.raises(RecipeError) as refused:
        _ = UnifiedCheckpoint(folder).config
    assert len(refused.value.faults) == 3


def test_config_is_read_in_both_spellings_of_rope(folder: Path) -> None:
    new = UnifiedCheckpoint(folder).config
    text = json.loads((folder / "config.json").read_text())
    theta = text.pop("rope_parameters")["rope_theta"]
    (folder / "config.json").write_text(json.dumps(text | {"rope_theta": theta}))
    assert UnifiedCheckpoint(folder).config == new
    assert new.rope_theta == 5000.0


def test_unknown_dtype_is_refused(folder: Path) -> None:
    shard = folder / "model.safetensors"
    data = shard.read_bytes()
    assert b'"BF16"' in data
    shard.write_bytes(data.replace(b'"BF16"', b'"F4_X"', 1))  # as long as before
    with pytest.raises(CorruptError, match=r"model\.safetensors: tensor .+ unknown dtype F4_X"):
        _ = UnifiedCheckpoint(folder).tensors


@pytest.mark.parametrize(
    ("kept_bytes", "shown"),
    [
        (-1, "is truncated"),  # in the last tensor
        (5000, "is truncated"),  # after the header
        (300, "is not a safetensors file"),  # in the header
        (5, "is not a safetensors file"),  # in its length
        (0, "is not a safetensors file"),
    ],
)
def test_truncated_file_is_refused_before_a_tensor_is_read(
    folder: Path, kept_bytes: int, shown: str
) -> None:
    shard = folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:kept_bytes])
    with pytest.raises(CorruptError, match=rf"model\.safetensors {shown}.* again"):
        _ = UnifiedCheckpoint(folder).tensors


def test_broken_header_is_refused(folder: Path) -> None:
    shard = folder / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[8:10] = b"}{"
    shard.write_bytes(data)
    with pytest.raises(CorruptError, match=r"model\.safetensors has a broken safetensors header"):
        _ = UnifiedCheckpoint(folder).tensors


def test_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CorruptError, match=r"holds no \*\.safetensors"):
        _ = UnifiedCheckpoint(folder).tensors


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.0.mlp.up_proj.weight_scale",
        "model.layers.0.self_attn.o_proj.input_scale",
        "model.norm.weight",
    ],
)
def test_graph_of_a_checkpoint_without_a_tensor_is_refused(
    fp8_checkpoint: Checkpoint, tmp_path: Path, name: str
) -> None:
    from safetensors.torch import load_file, save_file

    broken = Path(shutil.copytree(fp8_checkpoint.dir, tmp_path / "broken"))
    (shard,) = broken.glob("*.safetensors")
    tensors = load_file(shard)
    del tensors[name]
    save_file(tensors, shard)
    with pytest.raises(CorruptError, match=rf"tensor {re.escape(name)} is missing"):
        write_graph(broken, tmp_path / "graph")


def test_emptied_tensor_is_refused(fp8_checkpoint: Checkpoint, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    broken = Path(shutil.copytree(fp8_checkpoint.dir, tmp_path / "broken"))
    (shard,) = broken.glob("*.safetensors")
    tensors = load_file(shard)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = torch.empty((0, 64), dtype=tensors[name].dtype)
    save_file(tensors, shard)
    with pytest.raises(CorruptError, match=rf"tensor {re.escape(name)} has 0 bytes"):
        write_graph(broken, tmp_path / "graph")


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


def test_weights_file_holds_every_tensor_aligned_and_unchanged(
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


@pytest.mark.parametrize(("theta", "head_dim"), [(5000.0, 16), (100000.0, 64), (1e6, 128)])
def test_rope_tables_equal_transformers(theta: float, head_dim: int) -> None:
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    positions = torch.arange(512)[None]
    wanted = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    tables = rope_tables(theta=theta, rotary_dim=head_dim, context=512)
    for table, reference in zip(tables, wanted, strict=True):
        assert table.dtype == np.float64
        # Transformers multiplies in float32: 511 rad x 6e-8 is 3e-5.
        doubled = np.concatenate([table, table], axis=-1)
        np.testing.assert_allclose(doubled, reference[0].numpy(), rtol=0, atol=1e-4)
