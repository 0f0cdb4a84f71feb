"""Conditions of a card, what they say about a measurement, and samples of memory and power."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.acceptance.card import Reading, condition_findings, device_samples, gpu_lock, sampling
from pipeline.core.gpu import (
    ComputeProcess,
    Conditions,
    conditions_of,
    nvml_device,
    read_conditions,
    strangers,
)
from tests.nvml import CONSTANTS, NVMLError


def nvml(**other: Any) -> Any:
    """Plain values under the names of `pynvml`; what is not there the card does not tell."""
    values: dict[str, Any] = {
        "DeviceGetCudaComputeCapability": (9, 0),
        "SystemGetCudaDriverVersion_v2": 13020,
        "DeviceGetMemoryInfo": SimpleNamespace(total=80 << 30, used=5 << 30),
        "DeviceGetEnforcedPowerLimit": 650_000,
        "DeviceGetPowerManagementDefaultLimit": 700_000,
        "DeviceGetCurrentClocksEventReasons": 0x44,
        "DeviceGetEccMode": (1, 1),
        "DeviceGetName": "NVIDIA H100",
        "DeviceGetUUID": "GPU-1",
        "SystemGetDriverVersion": "580.1",
        "DeviceGetClockInfo": 1980,
        "DeviceGetTemperature": 40,
        "DeviceGetTotalEccErrors": 0,
        "DeviceGetUtilizationRates": SimpleNamespace(gpu=3, memory=1),
        "DeviceGetComputeRunningProcesses": [
            SimpleNamespace(pid=os.getpid(), usedGpuMemory=1),
            SimpleNamespace(pid=77, usedGpuMemory=None),
        ],
        **other,
    }

    def function(value: Any) -> Any:
        def call(*_: Any) -> Any:
            if isinstance(value, NVMLError):
                raise value
            return value

        return call

    functions = {f"nvml{name}": function(value) for name, value in values.items()}
    return SimpleNamespace(NVMLError=NVMLError, **CONSTANTS, **functions)


QUIET = dataclasses.replace(
    conditions_of(nvml(DeviceGetComputeRunningProcesses=[]), 0),
    power_limit_w=700.0,
    throttle_reasons=("sw_power_cap",),
)


def kinds(before: Conditions, after: Conditions) -> list[str]:
    return [finding.kind for finding in condition_findings(before, after)]


def test_values_of_nvml_get_units_and_names() -> None:
    found = conditions_of(nvml(), 0)
    assert (found.sm, found.cuda_driver) == (90, "13.2")
    assert (found.power_limit_w, found.power_limit_default_w) == (650.0, 700.0)
    assert found.throttle_reasons == ("sw_power_cap", "hw_thermal_slowdown")
    assert found.ecc_enabled is True
    assert found.utilization_percent == 3
    assert found.other_compute_processes == (ComputeProcess(pid=77, memory_bytes=None),)


def test_what_a_card_does_not_tell_is_none_and_no_fault() -> None:
    names = "EccMode TotalEccErrors EnforcedPowerLimit CurrentClocksEventReasons UtilizationRates"
    found = conditions_of(nvml(**{f"DeviceGet{name}": NVMLError() for name in names.split()}), 0)
    assert found.ecc_enabled is found.ecc_uncorrected is found.power_limit_w is None
    assert found.throttle_reasons is None
    assert kinds(found, found) == ["inconclusive", "inconclusive"]  # the process, twice
    json.dumps(dataclasses.asdict(found))


@pytest.mark.parametrize("when", ["before", "after"])
def test_another_compute_process_makes_a_measurement_inconclusive(when: str) -> None:
    other = (ComputeProcess(pid=4711, memory_bytes=1 << 30),)
    busy = dataclasses.replace(QUIET, other_compute_processes=other)
    pair = (busy, QUIET) if when == "before" else (QUIET, busy)
    (finding,) = condition_findings(*pair)
    assert finding.kind == "inconclusive"
    assert when in finding.message
    assert "4711" in finding.message


def test_another_card_or_new_memory_errors_make_it_inconclusive_too() -> None:
    assert kinds(QUIET, dataclasses.replace(QUIET, uuid="GPU-2")) == ["inconclusive"]
    old = dataclasses.replace(QUIET, ecc_uncorrected=3)
    assert kinds(old, old) == []
    assert kinds(old, dataclasses.replace(old, ecc_uncorrected=4)) == ["inconclusive"]


def test_heat_and_a_lowered_power_limit_are_told() -> None:
    hot = dataclasses.replace(QUIET, throttle_reasons=("hw_thermal_slowdown",), temperature_c=90)
    (finding,) = condition_findings(QUIET, hot)
    assert finding.kind == "note"
    assert "hw_thermal_slowdown" in finding.message
    assert "90 C" in finding.message
    assert kinds(QUIET, dataclasses.replace(QUIET, power_limit_w=450.0)) == ["note"]


def test_without_a_visible_card_there_are_no_conditions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert read_conditions() is None
    with nvml_device() as device:
        assert device is None
    with device_samples() as samples:
        pass
    assert samples.readings == []
    assert samples.peak_memory_bytes is None
    assert samples.energy_j is None


def hold(entered: Any, leave: Any) -> None:
    with gpu_lock("GPU-1"):
        entered.set()
        leave.wait(20)


def test_one_card_is_held_by_one_run_and_another_card_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENGINESMITH_CACHE", str(tmp_path))
    context = multiprocessing.get_context("spawn")
    entered, leave = context.Event(), context.Event()
    other = context.Process(target=hold, args=(entered, leave))
    other.start()
    assert entered.wait(20)
    got = threading.Event()

    def take() -> None:
        with gpu_lock("GPU-1"):
            got.set()

    waiting = threading.Thread(target=take)
    waiting.start()
    with gpu_lock("GPU-2"):
        assert not got.wait(0.3)
    leave.set()
    assert got.wait(20)
    waiting.join()
    other.join()


def at(second: float, used: int, **more: float) -> Reading:
    return Reading(at_s=second, memory_used_bytes=used, **more)  # type: ignore[arg-type]


def test_a_peak_between_begin_and_end_is_seen() -> None:
    used = [1]
    with sampling(lambda: at(time.monotonic(), used[0]), interval_s=0.01) as samples:
        used[0] = 100
        deadline = time.monotonic() + 10
        while samples.peak_memory_bytes != 100:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        used[0] = 2
    assert samples.peak_memory_bytes == 100
    assert samples.readings[-1].memory_used_bytes == 2


def test_a_series_that_broke_off_is_an_error() -> None:
    calls = []

    def read() -> Reading:
        calls.append(1)
        if len(calls) > 1:
            raise OSError("the card fell off the bus")
        return at(0, 1)

    def run() -> None:
        with sampling(read, interval_s=0.01):
            time.sleep(0.1)

    with pytest.raises(OSError, match="fell off the bus"):
        run()


def test_a_container_that_lists_not_even_this_process_hides_the_others_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert strangers([], 17, ours_is_there=True) is None
    monkeypatch.setattr("pipeline.core.gpu._holds_context", lambda: True)
    hidden = conditions_of(nvml(DeviceGetComputeRunningProcesses=[]), 0)
    assert hidden.other_compute_processes is None
    assert "inconclusive" not in kinds(hidden, hidden)


@pytest.mark.parametrize(
    ("percent", "found"), [(0, []), (5, []), (None, []), (6, ["inconclusive"])]
)
def test_a_desktop_draws_now_and_then_and_more_is_the_work_of_a_hidden_process(
    percent: int | None, found: list[str]
) -> None:
    busy = dataclasses.replace(QUIET, other_compute_processes=None, utilization_percent=percent)
    assert kinds(QUIET, busy) == found
