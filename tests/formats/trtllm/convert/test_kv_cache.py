"""An FP8 KV cache has one scale for keys and values; Transformers gets a cache that rounds too."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipeline.core.errors import CorruptError, RecipeError
from tests.formats.trtllm.convert.checkpoints import Converted, convert, edited

if TYPE_CHECKING:
    from tests.formats.trtllm.convert.checkpoints import Tensors

_K, _V = "self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale"


def with_scales(unified: Path, target: Path, k: float, v: float) -> Path:
    def edit(tensors: Tensors) -> None:
        for name in tensors:
            if name.endswith((_K, _V)):
                tensors[name] = tensors[name] * 0 + (k if name.endswith(_K) else v)

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
    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith((_K, _V))]:
            del tensors[name]

    with pytest.raises(RecipeError, match=r"has no k_scale and v_scale .* kv_cache_dtype=bfloat16"):
        convert(edited(llama, tmp_path / "unified", edit), tmp_path / "converted")


def test_half_of_the_cache_scales_is_a_damaged_checkpoint(llama: Path, tmp_path: Path) -> None:
    name = f"model.layers.1.{_V}"
    unified = edited(llama, tmp_path / "unified", lambda tensors: tensors.pop(name))
    with pytest.raises(CorruptError, match=f"{name} is missing"):
        convert(unified, tmp_path / "converted")
