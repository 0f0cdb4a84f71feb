"""Planted faults: each is found, and the tensor is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.cache import StageCache
from pipeline.core.errors import CorruptError, ExitCode
from pipeline.core.values import Checkpoint
from pipeline.quant.fp8 import SPEC
from pipeline.quant.verify import verify_checkpoint
from tests.quant.tiny_quantized import (
    CALIBRATION,
    edited,
    local_weights,
    tiny_checkpoint,
    tiny_quantizer,
)

LINEAR = "model.layers.1.mlp.up_proj"
WEIGHT = f"{LINEAR}.weight"
NORM = "model.layers.2.input_layernorm.weight"
Tensors = dict[str, Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("verify"))


def verify(made: Checkpoint, folder: Path) -> None:
    verify_checkpoint(folder, made.weights.dir, SPEC, made.quantized_linears)


def emptied(tensors: Tensors) -> None:
    tensors[WEIGHT] = tensors[WEIGHT][:0].clone()


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


def wrong_dtype(tensors: Tensors) -> None:
    tensors[NORM] = tensors[NORM].float()


def scale_nan(tensors: Tensors) -> None:
    tensors[f"{WEIGHT}_scale"] *= float("nan")


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
        (zeros, f"{WEIGHT} has "),
        (missing, f"{WEIGHT} is missing"),
        (missing_scale, f"{LINEAR}.input_scale is missing"),
        (extra, "model.layers.9.bias was not asked for"),
        (wrong_dtype, f"{NORM} has dtype float32, wanted bfloat16"),
        (scale_nan, f"{WEIGHT}_scale is nan"),
        (cache_scale_zero, "model.layers.0.self_attn.k_proj.k_scale is 0.0"),
        (one_bit, f"{NORM} differs from its source rounded to bfloat16"),
        (one_code, f"{WEIGHT} has 1 of 8192 values beyond FP8 error"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_planted_fault_names_the_tensor(
    made: Checkpoint, tmp_path: Path, change: Callable[[Tensors], None], message: str
) -> None:
    folder = edited(made.dir, tmp_path / "copy", change)
    with pytest.raises(CorruptError) as caught:
        verify(made, folder)
    assert f"\n    {message}" in str(caught.value)
    assert caught.value.exit_code is ExitCode.CORRUPT


def test_unchanged_copy_passes(made: Checkpoint, tmp_path: Path) -> None:
    verify(made, edited(made.dir, tmp_path / "copy", lambda _: None))


def test_long_lists_of_faults_are_cut_and_counted(made: Checkpoint, tmp_path: Path) -> None:
    def drop_all_norms(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("_scale")]:
            tensors[name] *= float("nan")

    with pytest.raises(CorruptError, match=r"and \d+ more"):
        verify(made, edited(made.dir, tmp_path / "copy", drop_all_norms))


def test_fp8_where_16_bit_was_asked_is_found(made: Checkpoint) -> None:
    with pytest.raises(CorruptError, match=f"{WEIGHT} has dtype float8_e4m3fn, wanted bfloat16"):
        verify_checkpoint(made.dir, made.weights.dir, SPEC, set(made.quantized_linears) - {LINEAR})


def test_ledger_says_what_rounding_cost_and_what_was_kept(made: Checkpoint) -> None:
    ledger = verify_checkpoint(made.dir, made.weights.dir, SPEC, made.quantized_linears)
    assert set(ledger["relative_error"]) == set(made.quantized_linears)
    # E4M3's error is spread evenly up to 2^-4 of a value: 2.6 % of normally distributed weights.
    assert all(0.02 < error < 0.03 for error in ledger["relative_error"].values())
    assert ledger == made.ledger


@pytest.mark.parametrize(("outlier", "lost"), [(3e4, False), (3e6, True)])
def test_linear_whose_weights_an_outlier_rounds_to_zero_is_refused(
    made: Checkpoint, tmp_path: Path, outlier: float, lost: bool
) -> None:
    """The rounding is right, value by value; what is left of the linear is one value."""
    import torch
    from safetensors.torch import load_file

    def with_outlier(tensors: Tensors) -> None:
        weight = tensors[WEIGHT].float()
        weight[0, 0] = outlier * weight.abs().mean()
        tensors[WEIGHT] = weight.to(torch.bfloat16)

    source = edited(made.weights.dir, tmp_path / "source", with_outlier)
    weight = load_file(source / "model.safetensors")[WEIGHT].float()

    def quantized(tensors: Tensors) -> None:
        scale = weight.abs().max() / 448
        tensors[WEIGHT] = (weight / scale).to(torch.float8_e4m3fn)
        tensors[f"{WEIGHT}_scale"] = scale

    folder = edited(made.dir, tmp_path / "copy", quantized)
    if not lost:
        verify_checkpoint(folder, source, SPEC, made.quantized_linears)
        return
    with pytest.raises(CorruptError, match=rf"{WEIGHT} lost \d+% of its weights to zero") as caught:
        verify_checkpoint(folder, source, SPEC, made.quantized_linears)
    assert "quantizer.keep_16bit" in str(caught.value)


@pytest.mark.parametrize("name", [WEIGHT, NORM, "model.embed_tokens.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_before_calibrating(
    made: Checkpoint, tmp_path: Path, name: str, value: float
) -> None:
    def broken(tensors: Tensors) -> None:
        tensors[name].view(-1)[3] = value

    source = edited(made.weights.dir, tmp_path / "source", broken)
    with pytest.raises(CorruptError, match=rf"NaN or infinite values.*\n    {name}") as caught:
        tiny_quantizer().quantize(
            local_weights(source), CALIBRATION, StageCache(root=tmp_path / "cache")
        )
    assert caught.value.exit_code == ExitCode.CORRUPT
