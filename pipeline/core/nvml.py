"""The state of this process's first CUDA device, by NVML; none on a CPU.

Take one before the first CUDA context of a measurement and one after the last: then every compute
process that NVML shows is this one, if it calibrated on the card, or somebody else's.

Names, units and bit values: NVIDIA's NVML API reference (nvml.h), as `pynvml` of nvidia-ml-py
has them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

THROTTLE_REASONS = {
    0x001: "gpu_idle",
    0x002: "applications_clocks_setting",
    0x004: "sw_power_cap",
    0x008: "hw_slowdown",
    0x010: "sync_boost",
    0x020: "sw_thermal_slowdown",
    0x040: "hw_thermal_slowdown",
    0x080: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
    0x200: "board_limit",
    0x400: "reliability",
}
"""nvmlClocksEventReason*, formerly nvmlClocksThrottleReason*."""


@dataclass(frozen=True, kw_only=True)
class ComputeProcess:
    """A process with a CUDA context on the card.

    Attributes:
        pid: As NVML numbers it: the host's number, in a container too.
        memory_bytes: Device memory that it holds; None where the driver does not tell.
    """

    pid: int
    memory_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """The card at one moment; None where this card or driver does not tell.

    Attributes:
        gpu: Name, such as `NVIDIA H100 80GB HBM3`.
        uuid: `GPU-…`.
        sm: Compute capability x 10.
        driver: Version of the NVIDIA driver.
        cuda_driver: Newest CUDA that the driver serves, such as `13.0`.
        memory_total_bytes: Memory of the card.
        memory_used_bytes: Used now, by anybody.
        power_limit_w: Enforced limit, watts.
        power_limit_default_w: The card's own limit, watts.
        sm_clock_mhz: Clock of the multiprocessors now.
        memory_clock_mhz: Clock of the memory now.
        temperature_c: Of the GPU.
        throttle_reasons: Why the clocks are not higher now, names of `THROTTLE_REASONS`.
        ecc_enabled: Whether the memory corrects errors.
        ecc_uncorrected: Errors since the driver was loaded that were not corrected.
        utilization_percent: Share of the last sampling period, 1/6 to 1 s, in which a kernel of
            anybody's ran.
        other_compute_processes: Those on the card that are not this process; None where they are
            hidden, as a container's PID namespace hides them: then only the utilization shows them.
    """

    gpu: str
    uuid: str
    sm: int
    driver: str
    cuda_driver: str | None
    memory_total_bytes: int | None
    memory_used_bytes: int | None
    power_limit_w: float | None
    power_limit_default_w: float | None
    sm_clock_mhz: int | None
    memory_clock_mhz: int | None
    temperature_c: int | None
    throttle_reasons: tuple[str, ...] | None
    ecc_enabled: bool | None
    ecc_uncorrected: int | None
    utilization_percent: int | None
    other_compute_processes: tuple[ComputeProcess, ...] | None

    def to_json(self) -> dict[str, Any]:
        """For the report."""
        processes, reasons = self.other_compute_processes, self.throttle_reasons
        return {
            **vars(self),
            "throttle_reasons": None if reasons is None else list(reasons),
            "other_compute_processes": None
            if processes is None
            else [vars(process).copy() for process in processes],
        }


def throttle_reason_names(mask: int) -> tuple[str, ...]:
    """Names of the bits of NVML's mask, lowest first; a bit that is not known by its number."""
    bits = (1 << index for index in range(mask.bit_length()) if mask >> index & 1)
    return tuple(THROTTLE_REASONS.get(bit, f"unknown_{bit:#x}") for bit in bits)


def read_conditions() -> Conditions | None:
    """The first CUDA device of this process as it is now; None where there is none."""
    with nvml_device() as device:
        return None if device is None else conditions_of(*device)


def conditions_of(nvml: Any, handle: Any) -> Conditions:
    """Ask NVML about one card.

    Args:
        nvml: The module `pynvml`.
        handle: Of the card.
    """

    def ask(name: str, *arguments: Any) -> Any:
        try:
            return getattr(nvml, name)(*arguments)
        except (nvml.NVMLError, AttributeError):  # not of this card, or not of this driver
            return None

    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    cuda = ask("nvmlSystemGetCudaDriverVersion_v2")
    memory = ask("nvmlDeviceGetMemoryInfo", handle)
    limit, own = (
        ask(f"nvmlDeviceGet{name}", handle)
        for name in ("EnforcedPowerLimit", "PowerManagementDefaultLimit")
    )
    mask = ask("nvmlDeviceGetCurrentClocksEventReasons", handle)
    if mask is None:
        mask = ask("nvmlDeviceGetCurrentClocksThrottleReasons", handle)
    ecc = ask("nvmlDeviceGetEccMode", handle)
    utilization = ask("nvmlDeviceGetUtilizationRates", handle)
    listed = ask("nvmlDeviceGetComputeRunningProcesses", handle)
    return Conditions(
        gpu=nvml.nvmlDeviceGetName(handle),
        uuid=nvml.nvmlDeviceGetUUID(handle),
        sm=10 * major + minor,
        driver=nvml.nvmlSystemGetDriverVersion(),
        cuda_driver=None if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}",
        memory_total_bytes=None if memory is None else int(memory.total),
        memory_used_bytes=None if memory is None else int(memory.used),
        power_limit_w=_milli(limit),
        power_limit_default_w=_milli(own),
        sm_clock_mhz=ask("nvmlDeviceGetClockInfo", handle, nvml.NVML_CLOCK_SM),
        memory_clock_mhz=ask("nvmlDeviceGetClockInfo", handle, nvml.NVML_CLOCK_MEM),
        temperature_c=ask("nvmlDeviceGetTemperature", handle, nvml.NVML_TEMPERATURE_GPU),
        throttle_reasons=None if mask is None else throttle_reason_names(mask),
        ecc_enabled=None if ecc is None else bool(ecc[0]),
        ecc_uncorrected=ask(
            "nvmlDeviceGetTotalEccErrors",
            handle,
            nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
            nvml.NVML_VOLATILE_ECC,
        ),
        utilization_percent=None if utilization is None else int(utilization.gpu),
        other_compute_processes=None
        if listed is None
        else strangers(
            [
                ComputeProcess(pid=int(process.pid), memory_bytes=process.usedGpuMemory)
                for process in listed
            ],
            os.getpid(),
            ours_is_there=_holds_context(),
        ),
    )


def strangers(
    processes: Sequence[ComputeProcess], own_pid: int, *, ours_is_there: bool
) -> tuple[ComputeProcess, ...] | None:
    """The processes that are not this one; None if NVML hides processes here.

    In a container NVML gives the host's numbers, and this process does not know its own there. If
    it holds a CUDA context, exactly one of the list is it, whichever: one is left out. A list in
    which not even this process stands hides the others too.

    Args:
        processes: On the card.
        own_pid: Of this process, as it sees itself.
        ours_is_there: This process holds a CUDA context.
    """
    others = tuple(process for process in processes if process.pid != own_pid)
    if ours_is_there and len(others) == len(processes):
        return others[1:] if others else None
    return others


def _holds_context() -> bool:
    """Whether this process has a CUDA context on its first device; never makes one.

    PyTorch may be initialised and have none yet, so the driver is asked.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    flags, active = ctypes.c_uint(), ctypes.c_int()
    driver = ctypes.CDLL("libcuda.so.1")
    failed = driver.cuDevicePrimaryCtxGetState(0, ctypes.byref(flags), ctypes.byref(active))
    return not failed and bool(active.value)


def _milli(value: int | None) -> float | None:
    """NVML gives milliwatts."""
    return None if value is None else value / 1e3


@contextlib.contextmanager
def nvml_device() -> Iterator[tuple[Any, Any] | None]:
    """`pynvml` and the handle of this process's first CUDA device; None where there is none."""
    try:
        import pynvml as nvml
    except ImportError:
        yield None
        return
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        yield None
        return
    try:
        yield _visible(nvml, os.environ.get("CUDA_VISIBLE_DEVICES"))
    finally:
        nvml.nvmlShutdown()


def _visible(nvml: Any, visible: str | None) -> tuple[Any, Any] | None:
    """The card that CUDA calls device 0.

    CUDA's own order is by speed, NVML's by bus: they differ where cards differ and
    CUDA_DEVICE_ORDER=PCI_BUS_ID is not set. Source: CUDA C++ Programming Guide, environment
    variables.
    """
    first = "0" if visible is None else visible.split(",")[0].strip()
    find: Callable[[Any], Any] = nvml.nvmlDeviceGetHandleByUUID
    key: Any = first
    if first.isdigit():
        find, key = nvml.nvmlDeviceGetHandleByIndex, int(first)
    try:
        return nvml, find(key)
    except nvml.NVMLError:
        return None
