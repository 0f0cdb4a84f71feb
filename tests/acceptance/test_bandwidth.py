"""The bandwidth probe on a driver that is made up, and its faults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.acceptance.bandwidth import REPEATS, WARM_UPS, copy_rates, measure_bandwidth
from pipeline.core.errors import PipelineError, ToolError


class Driver:
    """A driver; its copies take the times that it is given, and may not arrive."""

    def __init__(self, *milliseconds: float, arrives: bool = True, failing: str = "") -> None:
        self.milliseconds = list(milliseconds)
        self._arrives, self._failing = arrives, failing
        self._words: dict[int, int] = {}

    def __getattr__(self, name: str) -> Any:
        return lambda *_: 2 if name == self._failing else 0

    def cuMemAlloc_v2(self, buffer: Any, size: Any) -> int:  # noqa: N802
        buffer._obj.value = (len(self._words) + 1) << 40
        self._words[buffer._obj.value] = 0x5AC3  # an earlier probe left it behind
        return 0

    def cuMemsetD32_v2(self, buffer: Any, word: Any, count: Any) -> int:  # noqa: N802
        self._words[buffer.value] = word.value
        return 0

    def cuMemcpyDtoDAsync_v2(self, target: Any, source: Any, *_: Any) -> int:  # noqa: N802
        if self._arrives:
            self._words[target.value] = self._words[source.value]
        return 0

    def cuMemcpyDtoH_v2(self, word: Any, place: Any, size: Any) -> int:  # noqa: N802
        word._obj.value = self._words[place.value >> 40 << 40]
        return 0

    def cuEventElapsedTime(self, milliseconds: Any, *_: Any) -> int:  # noqa: N802
        milliseconds._obj.value = self.milliseconds.pop(0)
        return 0


def test_rate_counts_bytes_read_and_written_and_no_warm_up() -> None:
    driver = Driver(*(9000.0,) * WARM_UPS, *(500.0,) * (REPEATS - 1), 1000.0)
    rates = copy_rates(driver)
    assert rates == [4.0 * (1 << 30)] * (REPEATS - 1) + [2.0 * (1 << 30)]
    assert driver.milliseconds == []


def test_copy_that_did_not_arrive_and_a_refusal_are_faults() -> None:
    with pytest.raises(RuntimeError, match="not equal to its source"):
        copy_rates(Driver(*(1.0,) * (WARM_UPS + REPEATS), arrives=False))
    with pytest.raises(RuntimeError, match="cuDevicePrimaryCtxRetain gave CUDA error 2"):
        copy_rates(Driver(failing="cuDevicePrimaryCtxRetain"))


def child_with(monkeypatch: pytest.MonkeyPatch, folder: Path, ctypes_source: str) -> None:
    """Let the child import another `ctypes`, its first import."""
    (folder / "ctypes.py").write_text(ctypes_source)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_failure_of_the_child_is_raised_with_its_last_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child_with(monkeypatch, tmp_path, "raise ImportError('libffi is missing')")
    with pytest.raises(ToolError, match="ImportError: libffi"):
        measure_bandwidth()


@pytest.mark.parametrize(
    "printed",
    ["good bye", [1e12] * (REPEATS - 1), [0.0] * REPEATS, "[" + "Infinity," * 19 + "Infinity]"],
)
def test_rates_that_no_memory_has_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: object
) -> None:
    child_with(monkeypatch, tmp_path, f"print({str(printed)!r})\nraise SystemExit(0)")
    with pytest.raises(PipelineError, match="wanted 20 positive numbers"):
        measure_bandwidth()


def test_median_of_the_copies_is_the_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = [9e12, 1.0, *[3e12] * (REPEATS - 2)]
    child_with(monkeypatch, tmp_path, f"print({str(rates)!r})\nraise SystemExit(0)")
    assert measure_bandwidth() == 3e12
