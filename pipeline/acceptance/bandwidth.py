"""How fast this very card copies its own memory: the probe that the physics check stands on.

    python -P bandwidth.py cuda

copies and prints one JSON line. `measure_bandwidth` starts it so, in a process of its own: a CUDA
context takes some hundred megabytes, and they stay taken until its process ends. The script speaks
with NVIDIA's driver itself: on an H100 it took 0.4 to 0.5 s as a whole, and the same copies by way
of PyTorch 6 to 9 s, nearly all of it the import (2026-11-25). Standard library only, so that it
also runs where this project is not installed.
"""

from __future__ import annotations

import ctypes
import json
import math
import statistics
import sys
import time
from typing import Any, Protocol

BUFFER_BYTES = 1 << 30
"""Size of each of the two buffers on a GPU. L2 caches have 40 to 128 MB (A100 40, H100 50, RTX 4090
72, RTX PRO 6000 Blackwell 128: NVIDIA's papers on these architectures), so that of 1 GiB hardly
anything is still there when the next copy starts."""
LEAST_BUFFER_BYTES = 256 << 20
"""Below twice the largest L2 the cache would be measured too."""
CPU_BUFFER_BYTES = 64 << 20
REPEATS = 20
WARM_UPS = 3
"""The first copies load the kernel and bring up the clocks."""
_PATTERN, _NOTHING = 0x5AC3, 0
"""Words of the source and of the target before the first copy."""
_NO_DEVICE = 100
"""CUDA_ERROR_NO_DEVICE (cuda.h)."""
_TIMEOUT_S = 60.0
_KEY = "bytes_per_s"


class Memory(Protocol):
    """Two buffers of one device."""

    def fill(self, buffer: int, word: int) -> None:
        """Set every 32-bit word of a buffer: 0 is the source, 1 the target."""
        ...

    def copy(self) -> float:
        """Copy source to target; seconds."""
        ...

    def words(self, buffer: int) -> list[int]:
        """First, middle and last word of a buffer."""
        ...


class HostMemory:
    """Two buffers of this machine's memory."""

    def __init__(self, size_bytes: int) -> None:
        self._buffers = [(ctypes.c_uint32 * (size_bytes // 4))() for _ in range(2)]
        self._size_bytes = size_bytes

    def fill(self, buffer: int, word: int) -> None:
        data = word.to_bytes(4, sys.byteorder) * (self._size_bytes // 4)
        ctypes.memmove(self._buffers[buffer], data, self._size_bytes)

    def copy(self) -> float:
        source, target = self._buffers
        started = time.perf_counter()
        ctypes.memmove(target, source, self._size_bytes)
        return time.perf_counter() - started

    def words(self, buffer: int) -> list[int]:
        count = self._size_bytes // 4
        return [int(self._buffers[buffer][index]) for index in (0, count // 2, count - 1)]


class CudaMemory:
    """Two buffers of the first CUDA device, by the driver API (cuda.h, `libcuda.so.1`).

    Seconds are between two events on the stream of the copy, so that the host's own time is not in
    them. Nothing is freed: the process ends soon.
    """

    def __init__(self, driver: Any) -> None:
        """Make a context and the buffers.

        Args:
            driver: The loaded library, `cuInit` called.

        Raises:
            RuntimeError: The card has too little free memory, or the driver refuses.
        """
        self._driver = driver
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        self.size_bytes = buffer_bytes(free.value)
        self._buffers = [ctypes.c_uint64() for _ in range(2)]
        for buffer in self._buffers:
            self._call("cuMemAlloc_v2", ctypes.byref(buffer), ctypes.c_size_t(self.size_bytes))
        self._events = [ctypes.c_void_p() for _ in range(2)]
        for event in self._events:
            self._call("cuEventCreate", ctypes.byref(event), 0)

    def fill(self, buffer: int, word: int) -> None:
        count = ctypes.c_size_t(self.size_bytes // 4)
        self._call("cuMemsetD32_v2", self._buffers[buffer], ctypes.c_uint32(word), count)
        self._call("cuCtxSynchronize")

    def copy(self) -> float:
        (source, target), (start, end) = self._buffers, self._events
        self._call("cuEventRecord", start, None)
        size = ctypes.c_size_t(self.size_bytes)
        self._call("cuMemcpyDtoDAsync_v2", target, source, size, None)
        self._call("cuEventRecord", end, None)
        self._call("cuEventSynchronize", end)
        milliseconds = ctypes.c_float()
        self._call("cuEventElapsedTime", ctypes.byref(milliseconds), start, end)
        return milliseconds.value / 1e3

    def words(self, buffer: int) -> list[int]:
        found = []
        for offset in (0, self.size_bytes // 8 * 4, self.size_bytes - 4):
            word = ctypes.c_uint32()
            place = ctypes.c_uint64(self._buffers[buffer].value + offset)
            self._call("cuMemcpyDtoH_v2", ctypes.byref(word), place, ctypes.c_size_t(4))
            found.append(word.value)
        return found

    def _call(self, name: str, *arguments: Any) -> None:
        if code := getattr(self._driver, name)(*arguments):
            raise RuntimeError(f"{name} gave CUDA error {code}")


def buffer_bytes(free_bytes: int) -> int:
    """Size of each buffer, given what is free on the card; half of it is left to others.

    Raises:
        RuntimeError: Too little is free.
    """
    size_bytes = min(BUFFER_BYTES, free_bytes // 4 // 8 * 8)
    if size_bytes < LEAST_BUFFER_BYTES:
        raise RuntimeError(
            f"{free_bytes} bytes are free on the card, {4 * LEAST_BUFFER_BYTES} are needed; end "
            "what else runs on it"
        )
    return size_bytes


def copy_rates(memory: Memory, size_bytes: int, repeats: int) -> list[float]:
    """Bytes per second of each of `repeats` copies, after `WARM_UPS` that are not timed.

    A copy of n bytes reads n and writes n, so its rate is 2 n / seconds: that is how a memory's
    listed bandwidth counts.

    Raises:
        RuntimeError: What was copied did not arrive.
    """
    memory.fill(0, _PATTERN)
    memory.fill(1, _NOTHING)
    for _ in range(WARM_UPS):
        memory.copy()
    seconds = [memory.copy() for _ in range(repeats)]
    if memory.words(1) != [_PATTERN] * 3:
        raise RuntimeError(f"the copy is not equal to its source: {memory.words(1)}")
    return [2 * size_bytes / one for one in seconds]


def probe(device: str) -> dict[str, Any]:
    """The rates of the device, or None as rates where it is not there.

    Raises:
        RuntimeError: The card has too little free memory, or the copy failed.
    """
    if device == "cpu":
        memory: Memory = HostMemory(CPU_BUFFER_BYTES)
        return {_KEY: copy_rates(memory, CPU_BUFFER_BYTES, REPEATS)}
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return {_KEY: None}
    if code := driver.cuInit(0):
        if code == _NO_DEVICE:
            return {_KEY: None}
        raise RuntimeError(f"cuInit gave CUDA error {code}")
    card = CudaMemory(driver)
    return {_KEY: copy_rates(card, card.size_bytes, REPEATS), "size_bytes": card.size_bytes}


def measure_bandwidth(device: str = "cuda") -> float | None:
    """Bytes per second, read and written, of this process's first CUDA device; None without one.

    It is the median of `REPEATS` copies: what the card does again and again, where the best of them
    may be one that the clocks favoured. Nor would the best be a bound: reading alone can be faster
    than copying, so who looks for the impossible takes the larger of this and the listed bandwidth
    (`pipeline.acceptance.physics`).

    Args:
        device: `cuda`; or `cpu`, for this machine's memory.

    Raises:
        ToolError: The probe failed; the message has its last lines.
        PipelineError: It printed no rates, or such as no memory has.
    """
    from pipeline.core.nvml import nvml_device

    if device != "cpu":
        with nvml_device() as card:
            if card is None:  # known without a process
                return None
    return _median(_answer_of_child(device), device)


def _median(answer: dict[str, Any], device: str) -> float | None:
    from pipeline.core.errors import PipelineError

    rates = answer[_KEY]
    if rates is None:
        return None
    if len(rates) != REPEATS or not all(math.isfinite(rate) and rate > 0 for rate in rates):
        raise PipelineError(
            f"the bandwidth probe on {device} gave {rates} bytes/s, wanted {REPEATS} positive "
            "numbers; measure again"
        )
    return float(statistics.median(rates))


def _answer_of_child(device: str) -> dict[str, Any]:
    """What the script prints; its log stays in the temporary folder where it failed."""
    import shutil
    import tempfile
    from pathlib import Path

    from pipeline.core.errors import PipelineError
    from pipeline.core.process import last_lines, run_tool

    folder = Path(tempfile.mkdtemp(prefix="enginesmith-bandwidth-"))
    log_path = folder / "probe.log"
    # -P: this folder is not put on the path, where our modules could be taken for others.
    command = [sys.executable, "-P", __file__, device]
    run_tool(command, stage="bandwidth probe", log_path=log_path, timeout_s=_TIMEOUT_S)
    lines = last_lines(log_path)
    answers = [line for line in lines if line.startswith(f'{{"{_KEY}"')]
    if not answers:
        said = "\n".join(f"    {line}" for line in lines)
        raise PipelineError(f"the bandwidth probe printed no rates; see {log_path}\n{said}")
    shutil.rmtree(folder)
    answer: dict[str, Any] = json.loads(answers[-1])
    return answer


if __name__ == "__main__":
    print(json.dumps(probe(sys.argv[1])))
