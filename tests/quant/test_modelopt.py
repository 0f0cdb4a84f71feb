from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from pipeline.core.cache import StageCache
from pipeline.core.errors import RecipeError
from pipeline.core.values import Checkpoint
from pipeline.quant.modelopt import ModelOptJob
from pipeline.quant.unified import UnifiedCheckpoint
from pipeline.sources.text.corpus import text_digest
from tests.quant.tiny_quantized import CALIBRATION, RepeatedText, tiny_checkpoint, tiny_quantizer

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


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"]
)
def test_companions_are_copied_byte_for_byte(made: Checkpoint, name: str) -> None:
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


def test_second_time_comes_from_the_cache(
    root: Path, made: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_calibration(*_: object) -> None:
        raise AssertionError("calibrated a second time")

    quantizer = tiny_quantizer()
    monkeypatch.setattr(ModelOptJob, "_produce", no_calibration)
    cache = StageCache(root=root / "cache")
    again = quantizer.quantize(made.weights, CALIBRATION, cache)
    assert again == made


def test_too_little_text_is_a_recipe_fault_and_leaves_nothing(
    tmp_path: Path, made: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    import dataclasses

    caplog.set_level(logging.ERROR)
    short = dataclasses.replace(CALIBRATION, text=RepeatedText(repeats=1), seq_len=256)
    with pytest.raises(RecipeError, match="use a longer text or fewer windows"):
        tiny_quantizer().quantize(made.weights, short, StageCache(root=tmp_path))
    assert list((tmp_path / "stages" / "quantize").iterdir()) == []
