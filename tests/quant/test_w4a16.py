"""W4A16: codes, folding, the checkpoint as others read it, planted faults; graph and simulation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.core.cache import StageCache
from pipeline.core.errors import CorruptError
from pipeline.core.values import Checkpoint
from pipeline.model.hf import load_model
from pipeline.quant import w4a16
from pipeline.quant.modelopt import Calibrated, Factors, Written, verify_checkpoint
from pipeline.quant.simulate import load_simulation
from pipeline.quant.unified import UnifiedCheckpoint
from tests.architectures import ARCHITECTURES, covering, tiny_architecture
from tests.formats.decoder.decoders import (
    graph_logits,
    model_logits,
    random_prompt,
    write_graph,
)
from tests.quant.tiny_quantized import CALIBRATION, Edit, Tensors, edited, fill, local_weights

LINEAR = "model.layers.1.mlp.down_proj"


def read_packed(tensors: Tensors, module: str) -> Any:
    """Weights [rows, columns] of a `pack-quantized` linear, as its specification says; float32.

    Independent of the pipeline: integers are shifted one code at a time.
    """
    import torch

    packed, scale = tensors[f"{module}.weight_packed"], tensors[f"{module}.weight_scale"]
    rows, columns = tensors[f"{module}.weight_shape"].tolist()
    assert (packed.dtype, scale.dtype) == (torch.int32, torch.bfloat16)
    codes = torch.empty(rows, columns)
    for place in range(8):
        codes[:, place::8] = (packed.long() >> 4 * place & 15) - 8
    for column in range(columns):
        codes[:, column] *= scale[:, column * scale.shape[1] // columns].float()
    return codes


@pytest.mark.parametrize("seed", range(20))
def test_codes_and_weights_survive_packing(seed: int) -> None:
    import torch

    torch.manual_seed(seed)
    group = (32, 64, 128)[seed % 3]
    rows, groups = (int(size) for size in torch.randint(1, 9, (2,)))
    spread = torch.logspace(-6, 3, rows)[:, None]
    weights = torch.randn(rows, groups * group) * spread
    if seed % 4 == 0:
        weights[0, :group] = 0  # a group without a range
    codes, scale = w4a16.round_to_int4(weights, group)
    assert codes.abs().max() <= w4a16.CODE_MAX
    packed = w4a16.pack(codes)
    assert packed.shape == (rows, groups * group // 8)
    assert torch.equal(w4a16.unpack(packed), codes)
    tensors = {"x.weight_packed": packed, "x.weight_scale": scale}
    tensors["x.weight_shape"] = torch.tensor(weights.shape)
    restored = read_packed(tensors, "x")
    assert torch.equal(w4a16.dequantize(packed, scale), restored)
    half_a_step = 0.5001 * scale.float().repeat_interleave(group, 1)
    assert bool(((restored - weights).abs() <= half_a_step).all())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("w4a16")


FACTORS: dict[str, Mapping[str, Factors]] = {}
"""Digest of a checkpoint -> how its source was folded, which the checkpoint does not tell."""


def quantized(root: Path, name: str, *keep_16bit: str) -> Checkpoint:
    folder = root / name
    if not folder.exists():
        tiny_architecture(name, folder)
    seen: list[Mapping[str, Factors]] = []

    def write(calibrated: Calibrated, out_dir: Path) -> Written:
        seen.append((written := w4a16.write(calibrated, out_dir)).factors)
        return written

    quantizer = w4a16.W4a16Quantizer(keep_16bit=keep_16bit, device="cpu")
    job = replace(quantizer.job(CALIBRATION), write=write)
    made = job.quantize(local_weights(folder), StageCache(root=root / "cache"))
    FACTORS.setdefault(made.digest, *seen)
    return made


@pytest.fixture(params=covering(ARCHITECTURES, {"llama", "phi3", "qwen2.5", "gemma3"}))
def made(request: pytest.FixtureRequest, root: Path) -> Checkpoint:
    return quantized(root, request.param)


@pytest.fixture(scope="module")
def llama(root: Path) -> Checkpoint:
    return quantized(root, "llama")


def tensors_of(folder: Path) -> Tensors:
    from safetensors.torch import load_file

    (file,) = folder.glob("*.safetensors")
    loaded: Tensors = load_file(file)
    return loaded


def test_others_read_the_weights_that_we_simulate(made: Checkpoint) -> None:
    import torch

    tensors, model = tensors_of(made.dir), load_simulation(made.dir)
    declared = json.loads((made.dir / "config.json").read_text())["quantization_config"]
    assert not (made.dir / "hf_quant_config.json").exists()
    assert (declared["quant_method"], declared["format"]) == (
        "compressed-tensors",
        "pack-quantized",
    )
    group = declared["config_groups"]["group_0"]["weights"]["group_size"]
    for module in made.quantized_linears:
        weight = model.get_submodule(module).weight
        assert torch.equal(read_packed(tensors, module), weight), module
        assert tensors[f"{module}.weight_scale"].shape[1] * group == weight.shape[1]
    assert not any("pre_quant" in name or name.endswith("proj.weight") for name in tensors)


def test_folding_alone_changes_no_answer(made: Checkpoint) -> None:
    """The source's model with the factors, and nothing rounded but the norms they were made for."""
    import torch

    model, tokens = load_model(made.weights.dir, "float32"), random_prompt(40)
    wanted = model_logits(model, tokens)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if factors := FACTORS[made.digest].get(name):
                parameter.copy_(factors.of(parameter))
    np.testing.assert_allclose(model_logits(model, tokens), wanted, rtol=1e-3, atol=1e-4)
    folded = [one for one in FACTORS[made.digest].values() if one.columns is not None]
    assert len(folded) == 3 * len({"qkv", "gate_up", "down"}) + sum(
        len(names) - 1 for names in UnifiedCheckpoint(made.dir).spec.fused_modules().values()
    )
    assert all(float(one.columns.std()) > 0.01 for one in folded if one.columns is not None)


def test_graph_computes_what_the_simulation_does(made: Checkpoint, tmp_path: Path) -> None:
    tokens = random_prompt(100)
    graph = write_graph(made.dir, tmp_path / "graph")
    wanted = model_logits(load_simulation(made.dir, context=128), tokens)
    np.testing.assert_allclose(graph_logits(graph, tokens), wanted, rtol=1e-3, atol=1e-3)


def test_linears_that_are_kept_stay_as_they_were(root: Path) -> None:
    kept = ("model.layers.1.self_attn.[qkv]_proj", "model.layers.1.mlp.down_proj")
    made = quantized(root, "llama", *kept)
    assert len(made.kept_16bit) == 4
    checkpoint, source = UnifiedCheckpoint(made.dir), UnifiedCheckpoint(made.weights.dir)
    for name in (*made.kept_16bit, "model.layers.1.input_layernorm"):
        got, want = (opened.read(f"{name}.weight") for opened in (checkpoint, source))
        assert got.tobytes() == want.tobytes(), name
    ignored = json.loads((made.dir / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignored == ["lm_head", *sorted(made.kept_16bit)]
    checkpoint.check_tensors()


def shifted_scales(tensors: Tensors) -> None:
    """Every group of one row has its neighbour's scale."""
    scale = tensors[f"{LINEAR}.weight_scale"]
    scale[5] = scale[5].roll(1)


def swapped_nibbles(tensors: Tensors) -> None:
    import torch

    pairs = tensors[f"{LINEAR}.weight_packed"].view(torch.uint8)
    pairs[7] = pairs[7] >> 4 | pairs[7] << 4


def unfolded_norm(tensors: Tensors) -> None:
    name = "model.layers.1.input_layernorm.weight"
    tensors[name] = tensors[name] * 1.01


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shifted_scales, f"{LINEAR}.weight has "),
        (swapped_nibbles, f"{LINEAR}.weight has "),
        (unfolded_norm, "model.layers.1.input_layernorm.weight differs from its source"),
        (fill(f"{LINEAR}.weight_scale", 0.0), f"{LINEAR}.weight_scale is 0"),
    ],
)
def test_planted_fault_names_the_tensor(
    llama: Checkpoint, root: Path, tmp_path: Path, change: Edit, message: str
) -> None:
    factors = FACTORS[llama.digest]
    arguments = (llama.weights.dir, w4a16.SPEC, llama.quantized_linears)
    verify_checkpoint(llama.dir, *arguments, factors=factors)
    folder = edited(llama.dir, tmp_path / "copy", change)
    with pytest.raises(CorruptError, match=message):
        verify_checkpoint(folder, *arguments, factors=factors)


def test_shards_stay_as_the_source_has_them(llama: Checkpoint, root: Path) -> None:
    from safetensors.torch import save_file

    folder = Path(shutil.copytree(llama.weights.dir, root / "sharded"))
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    index = {name: f"model-{1 + ('layers.2.' in name)}-of-2.safetensors" for name in tensors}
    for file in sorted(set(index.values())):
        part = {name: tensor for name, tensor in tensors.items() if index[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    made = UnifiedCheckpoint(quantized(root, "sharded").dir)
    made.check_tensors()
    assert {entry.file.name for entry in made.tensors.values()} == set(index.values())
    whole = UnifiedCheckpoint(llama.dir)
    assert made.tensors.keys() == whole.tensors.keys()
    assert all(made.read(name).tobytes() == whole.read(name).tobytes() for name in whole.tensors)
