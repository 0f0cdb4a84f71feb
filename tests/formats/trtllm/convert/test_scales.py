"""Scales: of ModelOpt's own exports, which differ in a fused group, and of the KV cache."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipeline.core.errors import CorruptError, RecipeError
from tests.formats.trtllm.convert.checkpoints import Converted, convert, modelopt_checkpoint
from tests.quant.tiny_quantized import Tensors, drop, edited, fill, multiply

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch


_GROUPS = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.fc": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.gate": ("mlp.up_proj", "mlp.gate_proj"),
}
"""TensorRT-LLM's linear -> the modules that share its scale, its own first (all of qkv)."""


@pytest.fixture(scope="session")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Converted]:
    """A converted ModelOpt export, without scales of the cache."""

    @cache
    def make(name: str) -> Converted:
        root = tmp_path_factory.mktemp(f"foreign-{name}")
        return convert(
            modelopt_checkpoint(root, name, kv_scales=False), root / "converted", kv_fp8=False
        )

    return make


def tensors_of(folder: Path) -> Tensors:
    from safetensors.torch import load_file

    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def value(tensors: Tensors, name: str) -> torch.Tensor:
    """Dequantized weight of a Hugging Face module."""
    weights: torch.Tensor = tensors[f"{name}.weight"].float() * tensors[f"{name}.weight_scale"]
    return weights


@pytest.mark.parametrize("name", ["llama", "qwen2.5"])
@pytest.mark.parametrize("linear", _GROUPS)
def test_fused_parts_move_to_their_largest_scale(
    foreign: Callable[[str], Converted], name: str, linear: str
) -> None:
    import torch

    found = foreign(name)
    old, new = tensors_of(found.unified), tensors_of(found.dir)
    for layer in range(3):
        source, target = f"model.layers.{layer}", f"transformer.layers.{layer}.{linear}"
        group = [f"{source}.{module}" for module in _GROUPS[linear]]
        scales = [float(old[f"{module}.weight_scale"]) for module in group]
        assert len(set(scales)) > 1  # else the case shows nothing
        shared = max(scales)
        assert new[f"{target}.weights_scaling_factor"].tolist() == [shared]
        inputs = [float(old[f"{module}.input_scale"]) for module in group]
        assert new[f"{target}.activation_scaling_factor"].tolist() == [max(inputs)]
        parts = group if linear == "attention.qkv" else group[:1]
        wanted = torch.cat(
            [
                (
                    old[f"{module}.weight"].float() * float(old[f"{module}.weight_scale"]) / shared
                ).to(torch.float8_e4m3fn)
                for module in parts
            ]
        )
        assert new[f"{target}.weight"].float().equal(wanted.float())


def test_added_error_is_recorded_by_module_and_told(foreign: Callable[[str], Converted]) -> None:
    import torch

    found = foreign("llama")
    old, new = tensors_of(found.unified), tensors_of(found.dir)
    recorded = found.record["requantized"]
    assert len(recorded) == 3 * 3  # of q, k, v and of gate, up the one with the largest stays
    for module, error in recorded.items():
        layer, part = module.split(".")[2], module.split(".")[-1]
        target = f"transformer.layers.{layer}." + {
            "gate_proj": "mlp.fc",
            "up_proj": "mlp.gate",
        }.get(part, "attention.qkv")
        after = new[f"{target}.weight"].float() * new[f"{target}.weights_scaling_factor"]
        if target.endswith("qkv"):
            q, k, v = torch.split(after, [64, 32, 32])
            after = {"q_proj": q, "k_proj": k, "v_proj": v}[part]
        before = value(old, module)
        measured = float((after - before).norm() / before.norm())
        assert error == pytest.approx(measured, rel=1e-4)
        assert 0.005 < error < 0.06
    worst = max(recorded, key=recorded.__getitem__)
    (note,) = found.record["notes"]
    assert note.startswith("9 linears were rounded a second time")
    assert f"{recorded[worst]:.4f} at worst ({worst})" in note


def test_fused_model_needs_no_second_rounding(foreign: Callable[[str], Converted]) -> None:
    found = foreign("phi3")
    assert found.record["requantized"] == {}
    old, new = tensors_of(found.unified), tensors_of(found.dir)
    qkv = new["transformer.layers.1.attention.qkv.weight"]
    assert qkv.float().equal(old["model.layers.1.self_attn.qkv_proj.weight"].float())


def test_our_own_checkpoint_is_copied_byte_for_byte(converted: Callable[[str], Converted]) -> None:
    import torch

    found = converted("llama")
    assert found.record["requantized"] == {}
    assert found.record["merged_inputs"] == []
    old, new = tensors_of(found.unified), tensors_of(found.dir)
    for layer in range(3):
        source, target = f"model.layers.{layer}", f"transformer.layers.{layer}"
        wanted = torch.cat(
            [
                old[f"{source}.self_attn.{part}_proj.weight"].view(torch.uint8)
                for part in ("q", "k", "v")
            ]
        )
        assert new[f"{target}.attention.qkv.weight"].view(torch.uint8).equal(wanted)
        for theirs, ours in (("gate_proj", "fc"), ("up_proj", "gate"), ("down_proj", "proj")):
            assert (
                new[f"{target}.mlp.{ours}.weight"]
                .view(torch.uint8)
                .equal(old[f"{source}.mlp.{theirs}.weight"].view(torch.uint8))
            )


def test_different_activation_scales_of_a_fused_group_become_the_largest(
    llama: Path, tmp_path: Path
) -> None:
    name = "model.layers.1.self_attn.k_proj.input_scale"
    unified = edited(llama, tmp_path / "unified", multiply(name, 1.5))
    found = convert(unified, tmp_path / "converted")
    assert found.record["merged_inputs"] == ["transformer.layers.1.attention.qkv"]
    (note,) = found.record["notes"]
    assert note.startswith("1 linears had parts with different activation scales")
    scale = tensors_of(found.dir)["transformer.layers.1.attention.qkv.activation_scaling_factor"]
    assert scale.tolist() == tensors_of(unified)[name].reshape(1).tolist()


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_cache_scales_of_modelopt_are_found(tmp_path: Path, name: str) -> None:
    found = convert(modelopt_checkpoint(tmp_path, name, kv_scales=True), tmp_path / "converted")
    new = tensors_of(found.dir)
    scales = [
        float(tensor) for key, tensor in new.items() if key.endswith("kv_cache_scaling_factor")
    ]
    assert scales == [1.0, 1.0, 1.0]


_K, _V = "self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale"


def with_scales(unified: Path, target: Path, k: float, v: float) -> Path:
    def edit(tensors: Tensors) -> None:
        for name in tensors:
            if name.endswith((_K, _V)):
                fill(name, k if name.endswith(_K) else v)(tensors)

    return edited(unified, target, edit)


def written_scales(found: Converted) -> set[float]:
    from safetensors.torch import load_file

    tensors = load_file(found.dir / "rank0.safetensors")
    names = [name for name in tensors if "kv_cache" in name]
    assert names == [
        f"transformer.layers.{layer}.attention.kv_cache_scaling_factor" for layer in range(3)
    ]
    assert all(tensors[name].shape == (1,) for name in names)
    return {round(float(tensors[name]), 4) for name in names}


@pytest.mark.parametrize(
    ("k", "v", "written"), [(3.1, 1.7, 3.1), (1.7, 3.1, 3.1), (0.04, 0.01, 1.0), (0.04, 2.5, 2.5)]
)
def test_scale_is_the_larger_one_but_never_below_one(
    llama: Path, tmp_path: Path, k: float, v: float, written: float
) -> None:
    found = convert(with_scales(llama, tmp_path / "unified", k, v), tmp_path / "converted")
    assert written_scales(found) == {written}


def test_fp8_cache_without_scales_is_refused(llama: Path, tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.{part}" for layer in range(3) for part in (_K, _V)]
    plain = edited(llama, tmp_path / "unified", drop(*names))
    with pytest.raises(RecipeError, match=r"has no k_scale and v_scale .* kv_cache_dtype=bfloat16"):
        convert(plain, tmp_path / "converted")


def test_half_of_the_cache_scales_is_a_damaged_checkpoint(llama: Path, tmp_path: Path) -> None:
    name = f"model.layers.1.{_V}"
    unified = edited(llama, tmp_path / "unified", drop(name))
    with pytest.raises(CorruptError, match=f"{name} is missing"):
        convert(unified, tmp_path / "converted")
