"""Fused, biased and tied models on a CUDA device, whole and layer by layer, against the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.core.cache import StageCache
from pipeline.core.values import Checkpoint, Weights
from pipeline.quant.calibration import DeviceChoice
from pipeline.quant.unified import UnifiedCheckpoint
from tests.architectures import ARCHITECTURES, tiny_architecture
from tests.quant.tiny_quantized import CALIBRATION, local_weights, tiny_quantizer

pytestmark = pytest.mark.gpu


@pytest.fixture(params=ARCHITECTURES)
def weights(request: pytest.FixtureRequest, tmp_path: Path) -> Weights:
    import torch

    assert torch.cuda.is_available(), "make test-gpu needs a CUDA device"
    return local_weights(tiny_architecture(request.param, tmp_path / "model"))


def quantized(weights: Weights, device: DeviceChoice, root: Path) -> Checkpoint:
    quantizer = replace(tiny_quantizer(), device=device)
    return quantizer.quantize(weights, CALIBRATION, StageCache(root=root / device))


def test_every_way_of_calibrating_gives_the_same_checkpoint(
    weights: Weights, tmp_path: Path
) -> None:
    cpu = UnifiedCheckpoint(quantized(weights, "cpu", tmp_path).dir)
    choices: tuple[DeviceChoice, ...] = ("cuda", "layerwise")
    for device in choices:
        made = quantized(weights, device, tmp_path)
        assert made.calibration["device"] == device
        checkpoint = UnifiedCheckpoint(made.dir)
        assert checkpoint.tensors.keys() == cpu.tensors.keys()
        for name, entry in checkpoint.tensors.items():
            assert (entry.dtype, entry.shape) == (cpu.entry(name).dtype, cpu.entry(name).shape)
            if name.endswith("weight_scale"):
                assert checkpoint.scalar(name) == cpu.scalar(name), name
            elif name.endswith("_scale"):  # activations in bfloat16
                got, want = float(checkpoint.scalar(name)), float(cpu.scalar(name))
                assert got == pytest.approx(want, rel=0.05), name


def test_auto_takes_the_gpu_when_the_model_fits(weights: Weights, tmp_path: Path) -> None:
    assert quantized(weights, "auto", tmp_path).calibration["device"] == "cuda"
