from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.core.values import Checkpoint
from tests.formats.decoder.decoders import write_graph
from tests.quant.tiny_quantized import tiny_checkpoint


@pytest.fixture(scope="session")
def fp8_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The tiny model as ModelOpt quantizes it, layer 2's down_proj kept."""
    return tiny_checkpoint(tmp_path_factory.mktemp("fp8"), "model.layers.2.mlp.down_proj")


@pytest.fixture(scope="session")
def plain_dir(fp8_checkpoint: Checkpoint) -> Path:
    """The same model unquantized."""
    return fp8_checkpoint.weights.dir


@pytest.fixture(scope="session")
def fp8_graph(fp8_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The FP8 checkpoint's float32 graph."""
    return write_graph(fp8_checkpoint.dir, tmp_path_factory.mktemp("fp8-graph"))
