"""How fast this very card copies its own memory: the probe that the physics check stands on.

`measure_bandwidth` runs this file as a script, `python -P bandwidth.py`, which prints one JSON
line: a CUDA context takes some hundred megabytes until its process ends. The script speaks with
NVIDIA's driver itself: on an H100 it took 0.4 to 0.5 s as a whole, and the same copies by way of
PyTorch 6 to 9 s, nearly all of it the import (2026-11-25).
"""

from __future__ import annotations

import ctypes
import json
import math
import statistics
import sys
from typing import Any

BUFFER_BYTES = 1 << 30
"""Size of each of the two buffers. L2 caches have 40 to 128 MB (A100 40, H100 50, RTX 4090 72, RTX
PRO 6000 Blackwell 128: NVIDIA's papers on these architectures), so that of 1 GiB hardly anything is
still there when the next copy starts."""
REPEATS = 20
WARM_UPS = 3
"""The first copies load the kernel and bring up the clocks."""
_PATTERN = 0x5AC3
_TIMEOUT_S = 60.0


def copy_rates(driver: Any) -> list[float]:
    """Bytes per second of each of `REPEATS` copies on the first CUDA device, after `WARM_UPS`.

    By the driver API (cuda.h). A copy of n bytes reads n and writes n, so its rate is 2 n /
    seconds, as a memory's listed bandwidth counts; the seconds lie between two events on the copy's
    stream, without the host's time. Nothing is freed: the process ends soon. RuntimeError if the
    driver refuses, as for want of memory, or the copy did not arrive.
    """

    def call(name: str, *arguments: Any) -> None:
        if code := getattr(driver, name)(*arguments):
            advice = "end what else runs on the card"
            raise RuntimeError(f"{name} gave CUDA error {code}; {advice}, and see nvidia-smi")

    device, context = ctypes.c_int(), ctypes.c_void_p()
    call("cuInit", 0)
    call("cuDeviceGet", ctypes.byref(device), 0)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    call("cuCtxSetCurrent", context)
    size, words = ctypes.c_size_t(BUFFER_BYTES), ctypes.c_size_t(BUFFER_BYTES // 4)
    source, target = ctypes.c_uint64(), ctypes.c_uint64()
    start, end = ctypes.c_void_p(), ctypes.c_void_p()
    for buffer, value in ((source, _PATTERN), (target, 0)):
        call("cuMemAlloc_v2", ctypes.byref(buffer), size)
        call("cuMemsetD32_v2", buffer, ctypes.c_uint32(value), words)
    for event in (start, end):
        call("cuEventCreate", ctypes.byref(event), 0)
    rates = []
    for _ in range(WARM_UPS + REPEATS):
        call("cuEventRecord", start, None)
        call("cuMemcpyDtoDAsync_v2", target, source, size, None)
        call("cuEventRecord", end, None)
        call("cuEventSynchronize", end)
        milliseconds = ctypes.c_float()
        call("cuEventElapsedTime", ctypes.byref(milliseconds), start, end)
        rates.append(2e3 * BUFFER_BYTES / milliseconds.value)
    for offset in (0, BUFFER_BYTES // 2, BUFFER_BYTES - 4):
        word, place = ctypes.c_uint32(), ctypes.c_uint64(target.value + offset)
        call("cuMemcpyDtoH_v2", ctypes.byref(word), place, ctypes.c_size_t(4))
        if word.value != _PATTERN:
            raise RuntimeError(f"the copy is not equal to its source at byte {offset}")
    return rates[WARM_UPS:]


_NO_DRIVER = "null"


def measure_bandwidth() -> float | None:
    """Bytes per second, read and written, of this process's first CUDA device.

    The median of `REPEATS` copies: the best of them may be one that the clocks favoured. None where
    CUDA's driver library is missing. ToolError if the probe failed; PipelineError if it printed
    rates that no memory has.
    """
    import shutil
    import tempfile
    from pathlib import Path

    from pipeline.core.errors import PipelineError
    from pipeline.core.process import last_lines, run_tool

    log_path = Path(tempfile.mkdtemp(prefix="enginesmith-bandwidth-")) / "probe.log"
    # -P: this folder is not put on the path, where our modules could be taken for others.
    command = [sys.executable, "-P", __file__]
    run_tool(command, stage="bandwidth probe", log_path=log_path, timeout_s=_TIMEOUT_S)
    printed = last_lines(log_path)
    shutil.rmtree(log_path.parent)
    if printed[-1:] == (_NO_DRIVER,):
        return None
    rates = json.loads(printed[-1]) if printed and printed[-1].startswith("[") else []
    if len(rates) != REPEATS or not all(math.isfinite(rate) and rate > 0 for rate in rates):
        raise PipelineError(
            f"the bandwidth probe gave {printed}, wanted {REPEATS} positive numbers in bytes/s; "
            "measure again"
        )
    return float(statistics.median(rates))


if __name__ == "__main__":
    try:
        _driver = ctypes.CDLL("libcuda.so.1")
    except OSError:  # NVML alone, as in a container without the capability `compute`
        print(_NO_DRIVER)
    else:
        print(json.dumps(copy_rates(_driver)))
