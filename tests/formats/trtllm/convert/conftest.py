from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.formats.trtllm.convert.checkpoints import Converted, convert, unified_checkpoint

Convert = Callable[[str], Converted]


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Convert:
    """Converts a tiny architecture, with an FP8 cache, once a session."""

    @cache
    def make(name: str) -> Converted:
        root = tmp_path_factory.mktemp(name)
        return convert(unified_checkpoint(root, name), root / "converted")

    return make


@pytest.fixture(scope="session")
def llama(converted: Convert) -> Path:
    """The unified checkpoint of the tiny Llama."""
    return converted("llama").unified
