"""The quantizer, and the check of what it made: each planted fault is found, its tensor named."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import pytest

from pipeline.core.cache import StageCache
from pipeline.core.errors import CorruptError, ExitCode, RecipeError
from pipeline.core.values import Checkpoint
from pipeline.quant.fp8 import SPEC
from pipeline.quant.modelopt import verify_checkpoint
from pipeline.quant.unified import UnifiedCheckpoint
from pipeline.sources.text.corpus import text_digest
from tests.quant.tiny_quantized import (
    CALIBRATION,
    Edit,
    RepeatedText,
    Tensors,
    copy,
    drop,
    edited,
    fill,
    local_weights,
    shorten,
    tiny_checkpoint,
    tiny_quantizer,
)

PARTS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


LINEARS = [f"model.layers.{layer}.{part}" for layer in range(3) for part in PARTS]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quantize")


@pytest.fixture(scope="module")
def made(root: Path) -> Checkpoint:
    return tiny_checkpoint(root)


def test_every_scale_of_a_linear_is_exact_in_bfloat16(made: Checkpoint) -> None:
    import ml_dtypes
    import numpy as np

    checkpoint = UnifiedCheckpoint(made.dir)
    for name in LINEARS:
        for kind in ("weight", "input"):
            scale = checkpoint.scalar(f"{name}.{kind}_scale")
            assert scale == np.float32(scale.astype(ml_dtypes.bfloat16)), name


def test_companions_are_copied_byte_for_byte(made: Checkpoint) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"):
        assert (made.dir / name).read_bytes() == (made.weights.dir / name).read_bytes()


def test_record_tells_what_calibration_saw(made: Checkpoint) -> None:
    record = json.loads((made.dir / "calibration.json").read_text())
    assert record == made.calibration
    digest = text_digest(RepeatedText().documents())
    assert record["text"] == {"origin": "repeated", "digest": digest}
    assert record["tokens"] == 2 * 32
    assert record["device"] == "cpu"
    assert set(record["tools"]) == {"nvidia-modelopt", "torch", "transformers"}
    linear = {f"{name}.{kind}_quantizer" for name in LINEARS for kind in ("weight", "input")}
    cache = {
        f"model.layers.{layer}.self_attn.{part}_bmm_quantizer"
        for layer in range(3)
        for part in "kv"
    }
    assert set(record["amax"]) == linear | cache
    assert len(record["shared_scale"]) == 6


def test_too_little_text_is_a_recipe_fault_and_leaves_nothing(
    tmp_path: Path, made: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    short = dataclasses.replace(CALIBRATION, text=RepeatedText(repeats=1), seq_len=256)
    with pytest.raises(RecipeError, match="use a longer text or fewer windows"):
        tiny_quantizer().quantize(made.weights, short, StageCache(root=tmp_path))
    assert list((tmp_path / "stages" / "quantize").iterdir()) == []


LINEAR = "model.layers.1.mlp.up_proj"


WEIGHT = f"{LINEAR}.weight"


NORM = "model.layers.2.input_layernorm.weight"


K_SCALE = "model.layers.0.self_attn.k_proj.k_scale"


def verify(made: Checkpoint, folder: Path) -> None:
    verify_checkpoint(folder, made.weights.dir, SPEC, made.quantized_linears)


def zeros(tensors: Tensors) -> None:
    tensors[WEIGHT] = tensors[WEIGHT].float().mul(0).to(tensors[WEIGHT].dtype)


def wrong_dtype(tensors: Tensors) -> None:
    tensors[NORM] = tensors[NORM].float()


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
        (shorten(WEIGHT, 0), f"{WEIGHT} has shape (0, 64), its source (128, 64)"),
        (zeros, f"{WEIGHT} has "),
        (drop(WEIGHT), f"{WEIGHT} is missing"),
        (drop(f"{LINEAR}.input_scale"), f"{LINEAR}.input_scale is missing"),
        (copy(NORM, "model.layers.9.bias"), "model.layers.9.bias was not asked for"),
        (wrong_dtype, f"{NORM} has dtype float32, wanted bfloat16"),
        (fill(f"{WEIGHT}_scale", float("nan")), f"{WEIGHT}_scale is nan"),
        (fill(K_SCALE, 0.0), f"{K_SCALE} is 0.0"),
        (one_bit, f"{NORM} differs from its source rounded to bfloat16"),
        (one_code, f"{WEIGHT} has 1 of 8192 values beyond FP8 error"),
    ],
)
def test_planted_fault_names_the_tensor(
    made: Checkpoint, tmp_path: Path, change: Edit, message: str
) -> None:
    folder = edited(made.dir, tmp_path / "copy", change)
    with pytest.raises(CorruptError) as caught:
        verify(made, folder)
    assert f"\n    {message}" in str(caught.value)
    assert caught.value.exit_code is ExitCode.CORRUPT


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
