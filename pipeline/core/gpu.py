"""The NVIDIA GPUs of this machine: as `nvidia-smi` tells them, and their state, by NVML.

Take a card's state before the first CUDA context of a measurement and after the last: then every
compute process that NVML shows is this one, if it calibrated on the card, or somebody else's.

Names, units and bit values: NVIDIA's NVML API reference (nvml.h), as `pynvml` of nvidia-ml-py
has them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.core.errors import IncompatibleError

_COMMAND = (
    "nvidia-smi",
    "--query-gpu=index,name,compute_cap,memory.total,driver_version,uuid",
    "--format=csv,noheader,nounits",
)
_TIMEOUT_S = 60.0  # without persistence mode the first call takes seconds for each card

_WAYS_ON = {
    "Driver/library version mismatch": "the driver was updated while it was loaded; reboot",
    "couldn't communicate with the NVIDIA driver": "install the NVIDIA driver, or load it (sudo "
    "modprobe nvidia); in a container, start that one with docker run --gpus all",
    "not a valid field to query": "the driver is too old to tell its compute capability; install "
    "a newer one",
    "No devices were found": "the driver runs but sees no card; see dmesg",
}
"""By what nvidia-smi prints."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One card.

    Attributes:
        index: Number of the card in nvidia-smi, which is not always CUDA's.
        name: Such as `NVIDIA GeForce RTX 4090`.
        sm: Compute capability x 10: 89 for 8.9; None if the driver does not tell.
        memory_bytes: Its own memory; None for a card that shares the machine's.
        driver: Version of the NVIDIA driver.
        uuid: `GPU-…`; names the card in CUDA_VISIBLE_DEVICES.
    """

    index: int
    name: str
    sm: int | None
    memory_bytes: int | None
    driver: str
    uuid: str


def find_gpu(sm: int) -> Gpu:
    """The first card of this machine with compute capability `sm` / 10.

    Raises:
        IncompatibleError: There is no card, none of this SM, or the driver does not work.
    """
    gpus = probe_gpus()
    for gpu in gpus:
        if gpu.sm == sm:
            return gpu
    found = ", ".join(f"{gpu.name} (sm_{gpu.sm or '?'})" for gpu in gpus)
    raise IncompatibleError(
        f"this needs a GPU with sm_{sm}, found {found}: an engine runs only on the SM that it was "
        "built on; use a machine with such a card, or a target that is the card here"
    )


def probe_gpus() -> tuple[Gpu, ...]:
    """All cards of this machine, at least one.

    Raises:
        IncompatibleError: There is no card, or the driver is missing or does not work.
    """
    try:
        done = subprocess.run(
            _COMMAND,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            timeout=_TIMEOUT_S,
        )
    except FileNotFoundError as error:
        raise IncompatibleError(
            "no NVIDIA GPU here: nvidia-smi is missing, and it comes with the driver"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise IncompatibleError(
            f"nvidia-smi gave no answer in {_TIMEOUT_S:.0f} s: the driver hangs; see dmesg, reboot"
        ) from error
    if done.returncode == 0 and (gpus := parse_gpus(done.stdout)):
        return gpus
    said = " ".join(done.stdout.split()) or "nothing"
    ways_on = [way_on for text, way_on in _WAYS_ON.items() if text in said]
    raise IncompatibleError(
        f"no usable NVIDIA GPU here: nvidia-smi exited {done.returncode} and said: {said}"
        + "".join(f"; {way_on}" for way_on in ways_on)
    )


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """Read what nvidia-smi printed; a line that is no card (a warning, a fault) is left out."""
    rows = [[part.strip() for part in line.split(",")] for line in text.splitlines()]
    return tuple(
        Gpu(
            index=int(row[0]),
            name=row[1],
            sm=int(digits) if (digits := row[2].replace(".", "")).isdigit() else None,
            memory_bytes=int(row[3]) << 20 if row[3].isdigit() else None,  # it counts in MiB
            driver=row[4],
            uuid=row[5],
        )
        for row in rows
        if len(row) == 6 and row[0].isdigit()
    )


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
        return asdict(self)


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
        sm=10 * major + minor,
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


@contextlib.contextmanager
def nvml_devices(visible: str | None) -> Iterator[tuple[Any, list[Any]]]:
    """`pynvml` and handles of the cards that CUDA shows, its device 0 first.

    CUDA's own order is by speed, NVML's by bus: they differ where cards differ and
    CUDA_DEVICE_ORDER=PCI_BUS_ID is not set.

    Args:
        visible: `CUDA_VISIBLE_DEVICES`; None shows all. The list ends at the first entry that names
            no card (CUDA C++ Programming Guide, environment variables).

    Raises:
        IncompatibleError: No NVML, no driver, or it does not answer.
    """
    try:
        import pynvml as nvml
    except ImportError:
        raise IncompatibleError(
            "asking for a GPU needs nvidia-ml-py (pip install nvidia-ml-py)"
        ) from None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise IncompatibleError(f"no NVIDIA GPU here ({error})") from None
    try:
        yield nvml, list(_handles(nvml, visible))
    except nvml.NVMLError as error:
        raise IncompatibleError(f"NVML does not answer ({error})") from None
    finally:
        nvml.nvmlShutdown()


def _handles(nvml: Any, visible: str | None) -> Iterator[Any]:
    every = [str(index) for index in range(nvml.nvmlDeviceGetCount())] if visible is None else []
    for entry in map(str.strip, every if visible is None else visible.split(",")):
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
