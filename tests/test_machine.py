from __future__ import annotations

import importlib.util
import logging
import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pipeline.core.errors import ExitCode, IncompatibleError, TransientError
from pipeline.machine import require_builder, require_room
from pipeline.plan.sizes import BuildNeeds

Usage = namedtuple("Usage", "total used free")
ANY_BYTES = 10_000_000_000


def needing(disk_bytes: int, ram_bytes: int = 0) -> BuildNeeds:
    """What a build needs, as far as `require_room` reads it."""
    needs = SimpleNamespace(
        disk_bytes={"checkpoint": disk_bytes - disk_bytes // 3, "engine": disk_bytes // 3},
        quantize_ram_min_bytes=ram_bytes,
        compile_ram_bytes=0,
    )
    return cast(BuildNeeds, needs)


def hide(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    real = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> Any:
        return None if name in names else real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


def test_builder_names_every_missing_package_and_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hide(monkeypatch, "modelopt", "tensorrt_rtx")
    with pytest.raises(IncompatibleError) as caught:
        require_builder("trtrtx")
    assert "modelopt, tensorrt_rtx, not installed" in str(caught.value)
    assert "pip install '.[build]'" in str(caught.value)
    assert caught.value.exit_code is ExitCode.INCOMPATIBLE


def test_trtllm_format_needs_the_converter_and_no_other_compiler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hide(monkeypatch, "tensorrt_rtx", "onnx", "onnxruntime", "tensorrt_llm", "docker")
    require_builder("trtllm")
    hide(monkeypatch, "ml_dtypes")
    with pytest.raises(IncompatibleError, match="ml_dtypes, not installed"):
        require_builder("trtllm")


def test_full_disk_is_refused_with_both_numbers_and_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, ANY_BYTES - 1))
    with pytest.raises(TransientError, match="disk full") as caught:
        require_room(needing(ANY_BYTES), tmp_path / "not" / "made" / "yet")
    assert caught.value.exit_code is ExitCode.TRANSIENT
    for part in ("10.0 GB", str(tmp_path), "ENGINESMITH_CACHE"):
        assert part in str(caught.value)


def test_too_little_memory_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        require_room(needing(1, ram_bytes=1 << 60), tmp_path)
    assert "GB of memory" in caplog.text
