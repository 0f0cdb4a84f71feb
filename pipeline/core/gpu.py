"""The NVIDIA GPUs of this machine, and what state they are in, by NVML.

Names, units and bit values: NVIDIA's NVML API reference (nvml.h), as `pynvml` of nvidia-ml-py
has them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.core.errors import IncompatibleError

_WAYS_ON = {
    "mismatch": "; the driver was updated while it was loaded, so reboot",
    "Not Loaded": "; load the driver (sudo modprobe nvidia)",
    "Not Found": "; install the NVIDIA driver; start a container with docker run --gpus all",
}
"""By what NVML says."""
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
    """A process with a CUDA context on the card."""

    pid: int  # as NVML numbers it: the host's number, in a container too
    memory_bytes: int | None  # None where the driver does not tell


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """The card at one moment; None where this card or driver does not tell.

    Other processes on the card are None where they are hidden, as a container's PID namespace hides
    them: then only the utilization shows them.
    """

    gpu: str  # name, such as `NVIDIA H100 80GB HBM3`
    uuid: str
    sm: int  # compute capability x 10
    driver: str
    cuda_driver: str | None  # newest CUDA that the driver serves, such as `13.0`
    memory_total_bytes: int | None
    memory_used_bytes: int | None  # by all processes
    power_limit_w: float | None  # the enforced limit
    power_limit_default_w: float | None  # the card's own
    sm_clock_mhz: int | None
    memory_clock_mhz: int | None
    temperature_c: int | None
    throttle_reasons: tuple[str, ...] | None  # why the clocks are not higher: `THROTTLE_REASONS`
    ecc_enabled: bool | None
    ecc_uncorrected: int | None  # errors since the driver was loaded that were not corrected
    utilization_percent: int | None  # of the last sampling period, 1/6 to 1 s, with a kernel
    other_compute_processes: tuple[ComputeProcess, ...] | None


def throttle_reason_names(mask: int) -> tuple[str, ...]:
    """Names of the bits of NVML's mask, lowest first; a bit that is not known by its number."""
    bits = (1 << index for index in range(mask.bit_length()) if mask >> index & 1)
    return tuple(THROTTLE_REASONS.get(bit, f"unknown_{bit:#x}") for bit in bits)


def read_conditions() -> Conditions | None:
    """The first CUDA device of this process as it is now; None where there is none."""
    with nvml_device() as device:
        return None if device is None else conditions_of(*device)


def conditions_of(nvml: Any, handle: Any) -> Conditions:
    """What `pynvml` tells of one card."""

    def ask(name: str, *arguments: Any) -> Any:
        try:
            return getattr(nvml, name)(*arguments)
        except (nvml.NVMLError, AttributeError):  # not of this card, or not of this driver
            return None

    cuda = ask("nvmlSystemGetCudaDriverVersion_v2")
    memory = ask("nvmlDeviceGetMemoryInfo", handle)
    limit = ask("nvmlDeviceGetEnforcedPowerLimit", handle)
    own = ask("nvmlDeviceGetPowerManagementDefaultLimit", handle)
    mask = ask("nvmlDeviceGetCurrentClocksEventReasons", handle)
    if mask is None:
        mask = ask("nvmlDeviceGetCurrentClocksThrottleReasons", handle)
    ecc = ask("nvmlDeviceGetEccMode", handle)
    utilization = ask("nvmlDeviceGetUtilizationRates", handle)
    listed = ask("nvmlDeviceGetComputeRunningProcesses", handle)
    processes = [
        ComputeProcess(pid=int(one.pid), memory_bytes=one.usedGpuMemory) for one in listed or ()
    ]
    return Conditions(
        gpu=nvml.nvmlDeviceGetName(handle),
        uuid=nvml.nvmlDeviceGetUUID(handle),
        sm=sm_of(nvml, handle),
        driver=nvml.nvmlSystemGetDriverVersion(),
        cuda_driver=None if cuda is None else cuda_version(cuda),
        memory_total_bytes=None if memory is None else int(memory.total),
        memory_used_bytes=None if memory is None else int(memory.used),
        power_limit_w=None if limit is None else limit / 1e3,
        power_limit_default_w=None if own is None else own / 1e3,
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
        else strangers(processes, os.getpid(), ours_is_there=_holds_context()),
    )


def strangers(
    processes: Sequence[ComputeProcess], own_pid: int, *, ours_is_there: bool
) -> tuple[ComputeProcess, ...] | None:
    """The processes on the card that are not this one; None if NVML hides processes here.

    In a container NVML gives the host's numbers, and this process does not know its own there. If
    it holds a CUDA context (`ours_is_there`), one of the list is it: one is left out.
    """
    others = tuple(process for process in processes if process.pid != own_pid)
    if ours_is_there and len(others) == len(processes):
        return others[1:] if others else None
    return others


def _holds_context() -> bool:
    """Whether this process has a CUDA context on its first device; PyTorch may have none yet."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    flags, active = ctypes.c_uint(), ctypes.c_int()
    driver = ctypes.CDLL("libcuda.so.1")
    failed = driver.cuDevicePrimaryCtxGetState(0, ctypes.byref(flags), ctypes.byref(active))
    return not failed and bool(active.value)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One card; `sm` is its compute capability x 10, `uuid` names it in CUDA_VISIBLE_DEVICES."""

    name: str
    sm: int
    driver: str
    uuid: str


def find_gpu(sm: int) -> Gpu:
    """The first card of this machine with compute capability `sm` / 10; raises if there is none."""
    gpus = probe_gpus()
    for gpu in gpus:
        if gpu.sm == sm:
            return gpu
    found = ", ".join(f"{gpu.name} (sm_{gpu.sm})" for gpu in gpus)
    raise IncompatibleError(
        f"this needs a GPU with sm_{sm}, found {found}: an engine runs only on the SM that it was "
        "built on; use a machine with such a card, or a target that is the card here"
    )


def probe_gpus() -> tuple[Gpu, ...]:
    """All cards of this machine, at least one, those that CUDA_VISIBLE_DEVICES hides too."""
    with nvml_devices(None) as (nvml, devices):
        if not devices:
            raise IncompatibleError(
                "no NVIDIA GPU here: the driver runs but sees no card; see dmesg"
            )
        return tuple(
            Gpu(
                name=nvml.nvmlDeviceGetName(device),
                sm=sm_of(nvml, device),
                driver=nvml.nvmlSystemGetDriverVersion(),
                uuid=nvml.nvmlDeviceGetUUID(device),
            )
            for device in devices
        )


@contextlib.contextmanager
def nvml_devices(visible: str | None) -> Iterator[tuple[Any, list[Any]]]:
    """`pynvml` and handles of the cards that CUDA shows, its device 0 first.

    CUDA's own order is by speed, NVML's by bus: they differ where cards differ and
    CUDA_DEVICE_ORDER=PCI_BUS_ID is not set. `visible` is CUDA_VISIBLE_DEVICES, None for all; it
    ends at the first entry that names no card (CUDA C++ Programming Guide, environment variables).
    IncompatibleError without NVML or a driver that answers; it says what to do.
    """
    try:
        import pynvml as nvml
    except ImportError:
        fault = "asking for a GPU needs nvidia-ml-py (pip install nvidia-ml-py)"
        raise IncompatibleError(fault) from None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        way_on = "".join(way for text, way in _WAYS_ON.items() if text in str(error))
        raise IncompatibleError(f"no NVIDIA GPU here: NVML says {error}{way_on}") from None
    try:
        yield nvml, list(_handles(nvml, visible))
    except nvml.NVMLError as error:
        raise IncompatibleError(f"NVML does not answer: {error}; see dmesg") from None
    finally:
        nvml.nvmlShutdown()


def _handles(nvml: Any, visible: str | None) -> Iterator[Any]:
    if visible is None:
        visible = ",".join(map(str, range(nvml.nvmlDeviceGetCount())))
    for entry in map(str.strip, visible.split(",")):
        try:
            if entry.isdigit():
                yield nvml.nvmlDeviceGetHandleByIndex(int(entry))
            else:
                yield nvml.nvmlDeviceGetHandleByUUID(entry)
        except nvml.NVMLError:
            return


@contextlib.contextmanager
def nvml_device() -> Iterator[tuple[Any, Any] | None]:
    """`pynvml` and the handle of this process's first CUDA device; None where there is none."""
    with contextlib.ExitStack() as stack:
        found = None
        with contextlib.suppress(IncompatibleError):
            nvml, devices = stack.enter_context(
                nvml_devices(os.environ.get("CUDA_VISIBLE_DEVICES"))
            )
            found = (nvml, devices[0]) if devices else None
        yield found


def cuda_version(number: int) -> str:
    """A CUDA version as NVML numbers it: 13020 is `13.2`."""
    return f"{number // 1000}.{number % 1000 // 10}"


def sm_of(nvml: Any, device: Any) -> int:
    """Compute capability x 10."""
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(device)
    return int(10 * major + minor)
