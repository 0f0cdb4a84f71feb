"""A built engine for the runner's tests, and a machine that has the fakes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.core.cache import StageCache
from pipeline.core.values import Checkpoint, Engine
from pipeline.runners.trtllm import TrtLlmRunner
from tests.formats.trtllm.fakes import card_machine, compiler
from tests.quant.tiny_quantized import ADA

RUNNER = TrtLlmRunner(
    where="local",
    image="enginesmith-build:1.2.1",
    kv_cache_fraction=0.9,
    timeout_s=60.0,
)
PACKAGES = Path(__file__).parent / "fake_packages"


def runner_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with the card, `trtllm-build` and TensorRT-LLM's Python API."""
    card_machine(folder, monkeypatch)
    packages = (str(folder / "packages"), str(PACKAGES))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(packages))


def built_engine(checkpoint: Checkpoint, folder: Path) -> Engine:
    """The tiny engine: batch 4, 128 tokens of context, vocabulary 320."""
    cache = StageCache(root=folder / "cache")
    return compiler().compile(checkpoint, ADA, cache, folder / "logs")
