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
from tests.quant.tiny_quantized import (
    CALIBRATION,
    RepeatedText,
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
KEPT = ("model.layers.0.*", "model.layers.*.mlp.down_proj")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quantize")


@pytest.fixture(scope="module")
def made(root: Path) -> Checkpoint:
    return tiny_checkpoint(root)


@pytest.fixture(scope="module")
def mixed(root: Path, made: Checkpoint) -> Checkpoint:
    """The same weights, some linears kept."""
    cache = StageCache(root=root / "cache")
    return tiny_quantizer(*KEPT).quantize(made.weights, CALIBRATION, cache)


def test_every_linear_is_fp8_with_its_scales(made: Checkpoint) -> None:
    checkpoint = UnifiedCheckpoint(made.dir)
    assert sorted(made.quantized_linears) == sorted(checkpoint.quantized_linears) == sorted(LINEARS)
    assert made.kept_16bit == ()
    scales = {f"{name}.{kind}_scale" for name in LINEARS for kind in ("weight", "input")}
    kv_scales = {
        f"model.layers.{layer}.self_attn.{part}_proj.{part}_scale"
        for layer in range(3)
        for part in "kv"
    }
    source = set(UnifiedCheckpoint(made.weights.dir).tensors)
    assert set(checkpoint.tensors) == source | scales | kv_scales


def test_all_that_is_not_fp8_is_bfloat16(made: Checkpoint) -> None:
    tensors = UnifiedCheckpoint(made.dir).tensors
    others = {
        entry.dtype
        for name, entry in tensors.items()
        if not name.endswith("_scale") and name.removesuffix(".weight") not in LINEARS
    }
    assert others == {"bfloat16"}


def test_fused_linears_share_one_weight_scale(made: Checkpoint) -> None:
    checkpoint = UnifiedCheckpoint(made.dir)
    groups = checkpoint.spec.fused_modules()
    assert len(groups) == 6
    for names in groups.values():
        assert len({float(checkpoint.scalar(f"{name}.weight_scale")) for name in names}) == 1
    amax = made.calibration["amax"]
    own = {amax[f"{name}.weight_quantizer"] for name in groups["model.layers.0.self_attn.qkv"]}
    assert len(own) == 3, "this model would share its scales by itself; the test shows nothing"


def test_every_scale_of_a_linear_is_exact_in_bfloat16(made: Checkpoint) -> None:
    import ml_dtypes
    import numpy as np

    checkpoint = UnifiedCheckpoint(made.dir)
    for name in LINEARS:
        for kind in ("weight", "input"):
            scale = checkpoint.scalar(f"{name}.{kind}_scale")
            assert scale == np.float32(scale.astype(ml_dtypes.bfloat16)), name


def test_cache_scales_are_there_but_the_cache_is_declared_16_bit(made: Checkpoint) -> None:
    config = json.loads((made.dir / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"
    assert config["quantization_config"]["quant_algo"] == "FP8"
    assert "kv_cache_scheme" not in config["quantization_config"]
    declared = json.loads((made.dir / "hf_quant_config.json").read_text())["quantization"]
    assert (declared["quant_algo"], declared["kv_cache_quant_algo"]) == ("FP8", None)


def test_config_is_the_sources_own_with_the_quantization_added(made: Checkpoint) -> None:
    config = json.loads((made.dir / "config.json").read_text())
    del config["quantization_config"]
    assert config == json.loads((made.weights.dir / "config.json").read_text())


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


def test_kept_linears_stay_as_they_were(mixed: Checkpoint) -> None:
    kept = [name for name in LINEARS if ".layers.0." in name or name.endswith("down_proj")]
    assert sorted(mixed.kept_16bit) == sorted(kept)
    assert sorted(mixed.quantized_linears) == sorted(set(LINEARS) - set(kept))
    checkpoint, source = UnifiedCheckpoint(mixed.dir), UnifiedCheckpoint(mixed.weights.dir)
    for name in kept:
        assert checkpoint.tensors[f"{name}.weight"].dtype == "bfloat16"
        got, want = (opened.read(f"{name}.weight") for opened in (checkpoint, source))
        assert got.tobytes() == want.tobytes()
        assert f"{name}.weight_scale" not in checkpoint.tensors


def test_kept_linears_are_on_the_exclude_list(mixed: Checkpoint) -> None:
    import fnmatch

    declared = json.loads((mixed.dir / "hf_quant_config.json").read_text())["quantization"]
    patterns = declared["exclude_modules"]

    def excluded(name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    assert excluded("lm_head")
    assert {name for name in LINEARS if excluded(name)} == set(mixed.kept_16bit)


def test_keeping_half_of_a_fused_group_is_a_recipe_fault(root: Path, made: Checkpoint) -> None:
    quantizer = tiny_quantizer("model.layers.1.self_attn.q_proj")
    cache = StageCache(root=root / "cache")
    with pytest.raises(RecipeError) as caught:
        quantizer.quantize(made.weights, CALIBRATION, cache)
    (fault,) = caught.value.faults
    assert fault.path == "quantizer.keep_16bit"
    assert "model.layers.1.self_attn." in fault.message
    assert "keep all of them or none" in fault.message


def test_too_little_text_is_a_recipe_fault_and_leaves_nothing(
    tmp_path: Path, made: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    import dataclasses

    caplog.set_level(logging.ERROR)
    short = dataclasses.replace(CALIBRATION, text=RepeatedText(repeats=1), seq_len=256)
    with pytest.raises(RecipeError, match="use a longer text or fewer windows"):
        tiny_quantizer().quantize(made.weights, short, StageCache(root=tmp_path))
    assert list((tmp_path / "stages" / "quantize").iterdir()) == []
