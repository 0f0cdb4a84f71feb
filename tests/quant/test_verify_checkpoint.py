"""Planted faults: each is found, and the tensor is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import CorruptError, ExitCode
from pipeline.core.values import Checkpoint
from pipeline.quant.fp8 import SPEC
from pipeline.quant.verify import verify_checkpoint
from tests.quant.tiny_quantized import tiny_checkpoint

LINEAR = "model.layers.1.mlp.up_proj"
WEIGHT = f"{LINEAR}.weight"
NORM = "model.layers.2.input_layernorm.weight"
Tensors = dict[str, Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("verify"))


def verify(made: Checkpoint, folder: Path) -> None:
    verify_checkpoint(folder, made.weights.dir, SPEC, made.quantized_linears)


def planted(made: Checkpoint, folder: Path, change: Callable[[Tensors], None]) -> Path:
    """A copy of the checkpoint with its tensors changed."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(made.dir, folder)
    tensors = load_file(made.dir / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def emptied(tensors: Tensors) -> None:
    tensors[WEIGHT] = tensors[WEIGHT][:0].clone()


def emptied_norm(tensors: Tensors) -> None:
    tensors[NORM] = tensors[NORM][:0].clone()


def zeros(tensors: Tensors) -> None:
    import torch

    tensors[WEIGHT] = torch.zeros_like(tensors[WEIGHT])


def missing(tensors: Tensors) -> None:
    del tensors[WEIGHT]


def missing_scale(tensors: Tensors) -> None:
    del tensors[f"{LINEAR}.input_scale"]


def extra(tensors: Tensors) -> None:
    import torch

    tensors["model.layers.9.bias"] = torch.ones(1, dtype=torch.bfloat16)


def transposed(tensors: Tensors) -> None:
    tensors[WEIGHT] = tensors[WEIGHT].t().contiguous()


def wrong_dtype(tensors: Tensors) -> None:
    tensors[NORM] = tensors[NORM].float()


def not_quantized(tensors: Tensors) -> None:
    import torch

    tensors[WEIGHT] = tensors[WEIGHT].to(torch.bfloat16)


def scale_doubled(tensors: Tensors) -> None:
    tensors[f"{WEIGHT}_scale"] *= 2


def scale_nan(tensors: Tensors) -> None:
    tensors[f"{WEIGHT}_scale"] *= float("nan")


def input_scale_infinite(tensors: Tensors) -> None:
    tensors[f"{LINEAR}.input_scale"] *= float("inf")


def cache_scale_zero(tensors: Tensors) -> None:
    tensors["model.layers.0.self_attn.k_proj.k_scale"] *= 0


def one_bit(tensors: Tensors) -> None:
    import torch

    tensors[NORM].view(torch.int16)[3] ^= 1


def one_code(tensors: Tensors) -> None:
    """The sign of one FP8 value, the largest."""
    import torch

    flat = tensors[WEIGHT].float().abs().argmax()
    tensors[WEIGHT].view(torch.uint8).view(-1)[flat] ^= 0x80


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (emptied, f"{WEIGHT} has shape (0, 64), its source (128, 64)"),
        (emptied_norm, f"{NORM} has shape (0,), its source (64,)"),
        (zeros, f"{WEIGHT} has "),
        (missing, f"{WEIGHT} is missing"),
        (missing_scale, f"{LINEAR}.input_scale is missing"),
        (extra, "model.layers.9.bias was not asked for"),
        (transposed, f"{WEIGHT} has shape (64, 128), its source (128, 64)"),
        (wrong_dtype, f"{NORM} has dtype float32, wanted bfloat16"),
        (not_quantized, f"{WEIGHT} has dtype bfloat16, wanted float8_e4m3fn"),
        (scale_doubled, f"{WEIGHT} has "),
        (scale_nan, f"{WEIGHT}_scale is nan"),
        (input_scale_infinite, f"{LINEAR}.input_scale is inf"),
        (cache_scale_zero, "model.layers.0.self_attn.k_proj.k_scale is 0.0"),
        (one_bit, f"{NORM} differs from its source rounded to bfloat16"),
        (one_code, f"{WEIGHT} has 1 of 8192 values beyond FP8 error"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_planted_fault_names_the_tensor(
    made: Checkpoint, tmp_path: Path, change: Callable[[Tensors], None], message: str
) -> None:
    folder = planted(made, tmp_path / "copy", change)
    with pytest.raises(CorruptError) as caught:
        verify(made, folder)
    assert f"\n    {message}" in str(caught.value)
    assert caught.value.exit_code is ExitCode.CORRUPT


def test_missing_weight_scale_is_named(made: Checkpoint, tmp_path: Path) -> None:
    folder = planted(made, tmp_path / "copy", lambda tensors: tensors.pop(f"{WEIGHT}_scale"))
    with pytest.raises(CorruptError, match=f"{WEIGHT}_scale is missing"):
        verify(made, folder)


def test_unchanged_copy_passes(made: Checkpoint, tmp_path: Path) -> None:
    verify(made, planted(made, tmp_path / "copy", lambda _: None))


def test_long_lists_of_faults_are_cut_and_counted(made: Checkpoint, tmp_path: Path) -> None:
    def drop_all_norms(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("_scale")]:
            tensors[name] *= float("nan")

    with pytest.raises(CorruptError, match=r"and \d+ more"):
        verify(made, planted(made, tmp_path / "copy", drop_all_norms))


def test_fp8_where_16_bit_was_asked_is_found(made: Checkpoint) -> None:
    with pytest.raises(CorruptError, match=f"{WEIGHT} has dtype float8_e4m3fn, wanted bfloat16"):
        verify_checkpoint(made.dir, made.weights.dir, SPEC, set(made.quantized_linears) - {LINEAR})
