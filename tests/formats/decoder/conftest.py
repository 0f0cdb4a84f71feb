from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.core.cache import StageCache, digest_folder
from pipeline.core.values import Checkpoint, Licence, Weights
from pipeline.quant.fp8 import Fp8Quantizer
from pipeline.sources.text.calibration import Calibration
from pipeline.sources.text.topics import PydocTopics
from tests.formats.decoder.decoders import write_graph
from tests.tiny import tiny_model


@pytest.fixture(scope="session")
def plain_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny unquantized model."""
    return tiny_model(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="session")
def plain_graph(plain_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its float32 graph."""
    return write_graph(plain_dir, tmp_path_factory.mktemp("plain-graph"))


@pytest.fixture(scope="session")
def fp8_checkpoint(plain_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The tiny model as ModelOpt quantizes it, layer 2's down_proj kept."""
    weights = Weights(
        dir=plain_dir,
        origin="local:tiny",
        commit=None,
        files=tuple(digest_folder(plain_dir)),
        licence=Licence(spdx="Apache-2.0", files=("LICENSE",)),
    )
    calibration = Calibration(
        text=PydocTopics(part="calibrate"), calib_size=2, seq_len=32, batch_size=2, seed=0
    )
    quantizer = Fp8Quantizer(
        keep_16bit=("model.layers.2.mlp.down_proj",),
        device="cpu",
    )
    cache = StageCache(root=tmp_path_factory.mktemp("stage-cache"))
    return quantizer.quantize(weights, calibration, cache)


@pytest.fixture(scope="session")
def fp8_graph(fp8_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The FP8 checkpoint's float32 graph."""
    return write_graph(fp8_checkpoint.dir, tmp_path_factory.mktemp("fp8-graph"))
