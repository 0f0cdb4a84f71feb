"""The bandwidth probe: the same code on a CPU, and its faults."""

from __future__ import annotations

import ctypes
import json
import math
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pipeline.acceptance import bandwidth
from pipeline.acceptance.bandwidth import (
    REPEATS,
    WARM_UPS,
    HostMemory,
    buffer_bytes,
    copy_rates,
    measure_bandwidth,
    probe,
)
from pipeline.core.errors import PipelineError, ToolError
from pipeline.core.nvml import read_conditions


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the child's log goes."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@dataclass
class Card:
    """Two buffers whose copies take the times they are told, and may not arrive."""

    seconds: list[float]
    arrives: bool = True
    buffers: list[list[int]] = field(default_factory=lambda: [[9, 9, 9], [9, 9, 9]])

    def fill(self, buffer: int, word: int) -> None:
        self.buffers[buffer] = [word] * 3

    def copy(self) -> float:
        if self.arrives:
            self.buffers[1] = self.buffers[0]
        return self.seconds.pop(0)

    def words(self, buffer: int) -> list[int]:
        return self.buffers[buffer]


def test_rate_counts_bytes_read_and_written_and_no_warm_up() -> None:
    card = Card([9.0] * WARM_UPS + [0.5, 1.0])
    assert copy_rates(card, 4000, 2) == [16000.0, 8000.0]
    assert card.seconds == []


def test_copy_that_did_not_arrive_is_a_fault() -> None:
    with pytest.raises(RuntimeError, match="not equal to its source"):
        copy_rates(Card([0.5] * (WARM_UPS + 1), arrives=False), 4000, 1)
    # Memory that an earlier probe left behind must not pass for a copy.
    stale = Card([0.5] * (WARM_UPS + 1), arrives=False, buffers=[[9] * 3, [0x5AC3] * 3])
    with pytest.raises(RuntimeError, match="not equal to its source"):
        copy_rates(stale, 4000, 1)


def test_buffer_is_a_gibibyte_or_a_quarter_of_what_is_free() -> None:
    assert buffer_bytes(80 << 30) == 1 << 30
    assert buffer_bytes((2 << 30) + 12) == 512 << 20
    assert buffer_bytes(1 << 30) == 256 << 20
    with pytest.raises(RuntimeError, match="bytes are free on the card, 1073741824 are needed"):
        buffer_bytes((1 << 30) - 1)


def test_host_memory_is_copied_whole() -> None:
    memory = HostMemory(1 << 12)
    memory.fill(0, 7)
    memory.fill(1, 8)
    assert memory.words(1) == [8, 8, 8]
    assert memory.copy() > 0
    assert memory.words(0) == memory.words(1) == [7, 7, 7]


class Driver:
    """A driver whose calls succeed but for one."""

    def __init__(self, failing: str, code: int) -> None:
        self._failing, self._code = failing, code

    def __getattr__(self, name: str) -> Any:
        return lambda *_: self._code if name == self._failing else 0


def test_refusal_of_the_driver_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver("cuDevicePrimaryCtxRetain", 2)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    with pytest.raises(RuntimeError, match="cuDevicePrimaryCtxRetain gave CUDA error 2"):
        probe("cuda")


@pytest.mark.parametrize(("code", "there"), [(100, False), (999, True)])
def test_driver_without_a_device_has_no_rate_and_a_broken_one_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, code: int, there: bool
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver("cuInit", code))
    if not there:
        assert probe("cuda") == {"bytes_per_s": None}
        return
    with pytest.raises(RuntimeError, match="cuInit gave CUDA error 999"):
        probe("cuda")


def test_child_measures_this_machines_memory_and_leaves_nothing(temporary: Path) -> None:
    rate = measure_bandwidth("cpu")
    assert rate is not None
    assert rate > 1e6
    assert list(temporary.iterdir()) == []


@pytest.mark.skipif(read_conditions() is not None, reason="there is a CUDA device")
def test_machine_without_cuda_has_no_rate(temporary: Path) -> None:
    assert measure_bandwidth() is None
    assert probe("cuda") == {"bytes_per_s": None}
    script = subprocess.run(
        [sys.executable, "-P", bandwidth.__file__, "cuda"], capture_output=True, check=True
    )
    assert json.loads(script.stdout) == {"bytes_per_s": None}


def child_with(monkeypatch: pytest.MonkeyPatch, folder: Path, ctypes_source: str) -> None:
    """Let the child import another `ctypes`, the first thing that it needs of a driver."""
    (folder / "packages").mkdir()
    (folder / "packages" / "ctypes.py").write_text(ctypes_source)
    monkeypatch.setenv("PYTHONPATH", str(folder / "packages"))


def test_failure_of_the_child_is_told_with_its_last_lines(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child_with(monkeypatch, temporary, "raise ImportError('libffi is missing')")
    with pytest.raises(ToolError, match="ImportError: libffi"):
        measure_bandwidth("cpu")


def test_child_that_prints_no_rates_is_told(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child_with(monkeypatch, temporary, "print('good bye')\nraise SystemExit(0)")
    with pytest.raises(PipelineError, match=r"printed no rates(.|\n)*good bye"):
        measure_bandwidth("cpu")


@pytest.mark.parametrize(
    "rates", [[1e12] * (REPEATS - 1), [0.0] * REPEATS, [math.inf] * REPEATS, [math.nan] * REPEATS]
)
def test_rates_that_no_memory_has_are_refused(
    monkeypatch: pytest.MonkeyPatch, rates: list[float]
) -> None:
    answer_with(monkeypatch, {"bytes_per_s": rates})
    with pytest.raises(PipelineError, match="wanted 20 positive numbers"):
        measure_bandwidth("cpu")


def test_median_of_the_copies_is_the_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(monkeypatch, {"bytes_per_s": [9e12, 1.0, *[3e12] * (REPEATS - 2)]})
    assert measure_bandwidth("cpu") == 3e12


def answer_with(monkeypatch: pytest.MonkeyPatch, answer: dict[str, Any]) -> None:
    monkeypatch.setattr(bandwidth, "_answer_of_child", lambda device: answer)
