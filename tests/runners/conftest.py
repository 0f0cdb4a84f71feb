from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.model.hf import load_tokenizer
from pipeline.runners.onnxruntime import OnnxRuntimeGraph
from tests.formats.decoder.decoders import open_graph, write_graph
from tests.tiny import tiny_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny unquantized model."""
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def graph(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> OnnxRuntimeGraph:
    """Its loaded graph, context 48."""
    return open_graph(write_graph(model_dir, tmp_path_factory.mktemp("graph"), context=48))


@pytest.fixture(scope="session")
def tokenizer(model_dir: Path) -> Any:
    return load_tokenizer(model_dir)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary folder of the test's own, to see what stays in it."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield folder
    tempfile.tempdir = None
