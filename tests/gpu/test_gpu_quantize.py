"""Calibration on a CUDA device, whole and layer by layer, against the CPU."""

from pathlib import Path

import pytest

from pipeline.core.cache import StageCache, digest_folder
from pipeline.core.values import Checkpoint, Licence, Weights
from pipeline.quant.calibration import DeviceChoice
from pipeline.quant.fp8 import Fp8Quantizer
from pipeline.quant.unified import UnifiedCheckpoint
from pipeline.sources.text.corpus import Calibration
from pipeline.sources.text.topics import PydocTopics
from tests.tiny import tiny_model

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    import torch

    assert torch.cuda.is_available(), "make test-gpu needs a CUDA device"
    folder = tiny_model(tmp_path_factory.mktemp("tiny"))
    return Weights(
        dir=folder,
        origin="tiny",
        commit=None,
        files=digest_folder(folder),
        licence=Licence(spdx="Apache-2.0"),
    )


def quantized(weights: Weights, device: DeviceChoice, root: Path) -> Checkpoint:
    calibration = Calibration(
        text=PydocTopics(part="calibrate"), calib_size=4, seq_len=64, batch_size=2, seed=0
    )
    cache = StageCache(root=root / device)
    return Fp8Quantizer(device=device).quantize(weights, calibration, cache)


def test_cuda_and_layerwise_calibrate_like_the_cpu(weights: Weights, tmp_path: Path) -> None:
    made = {device: quantized(weights, device, tmp_path) for device in ("cpu", "cuda", "layerwise")}
    cpu = UnifiedCheckpoint(made["cpu"].dir)
    for device in ("cuda", "layerwise"):
        assert made[device].calibration["device"] == device
        checkpoint = UnifiedCheckpoint(made[device].dir)
        assert set(checkpoint.tensors) == set(cpu.tensors)
        for name in cpu.tensors:
            if name.endswith("weight_scale"):
                assert checkpoint.scalar(name) == cpu.scalar(name)
            elif name.endswith("_scale"):  # activations in bfloat16
                assert float(checkpoint.scalar(name)) == pytest.approx(
                    float(cpu.scalar(name)), rel=0.05
                )


def test_auto_takes_the_gpu_when_the_model_fits(weights: Weights, tmp_path: Path) -> None:
    assert quantized(weights, "auto", tmp_path).calibration["device"] == "cuda"
