"""The data that plans are made of: cards and model shapes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.core.hardware import GIB, Target
from pipeline.model.spec import ModelSpec

ROOT = Path(__file__).parents[2]
TARGETS = sorted(path.stem for path in (ROOT / "conf" / "target").glob("*.yaml"))
SHAPES = sorted(path.stem for path in (ROOT / "recipes" / "shapes").glob("*.yaml"))

# Parameter counts as the Hub's model cards and safetensors indices state them.
PARAMS = {
    "smollm2": 134_515_008,
    "phi3": 3_821_079_552,
    "mistral": 7_248_023_552,
    "qwen2.5": 7_615_616_512,
    "llama3.1": 8_030_261_248,
}


def test_all_nine_cards_and_five_shapes_are_there() -> None:
    assert set(TARGETS) >= {
        *("rtx4090", "rtx4080", "rtx6000ada", "l40s", "l4", "rtx5090", "a100", "h100", "h200")
    }
    assert set(SHAPES) >= set(PARAMS)


@pytest.mark.parametrize("name", TARGETS)
def test_target_is_named_like_its_file_and_its_card_like_nvml(
    name: str, target_of: Callable[[str], Target]
) -> None:
    target = target_of(name)
    assert target.id == name
    assert target.card.startswith("NVIDIA-")
    assert " " not in target.card
    assert target.source
    assert target.memory_bytes == pytest.approx(target.memory_gib * GIB, abs=1)


@pytest.mark.parametrize("name", TARGETS)
def test_fp8_peak_is_twice_the_16bit_peak_and_only_where_the_card_has_it(
    name: str, target_of: Callable[[str], Target]
) -> None:
    # Dense peaks of one card, same accumulation: a sparse number slipping in breaks the ratio.
    target = target_of(name)
    if target.sm < 89:
        assert set(target.tflops) == {"fp16"}
    else:
        assert target.flops("fp8") == pytest.approx(2 * target.flops("fp16"), rel=0.01)


@pytest.mark.parametrize("name", ["rtx4090", "rtx4080", "rtx5090"])
def test_geforce_peaks_are_those_with_fp32_accumulation(
    name: str, target_of: Callable[[str], Target]
) -> None:
    # SMs x boost clock x FLOP per clock and SM: 512 in FP16 with FP32 accumulation on GeForce.
    sms_and_mhz = {"rtx4090": (128, 2520), "rtx4080": (76, 2505), "rtx5090": (170, 2407)}
    sms, mhz = sms_and_mhz[name]
    assert target_of(name).flops("fp16") == pytest.approx(sms * mhz * 512 * 1e6, rel=0.01)


@pytest.mark.parametrize("name", SHAPES)
def test_shape_has_the_known_number_of_parameters(
    name: str, shape_of: Callable[[str], ModelSpec]
) -> None:
    assert shape_of(name).params == PARAMS[name]
