"""Memory and power of the card while something runs on it, sampled from a thread."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from pipeline.core.gpu import nvml_device

INTERVAL_S = 0.1
"""NVML's power is an average over 25 ms or more, by card: a shorter interval tells nothing new."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The card at one moment.

    Attributes:
        at_s: Seconds of a monotonic clock.
        memory_used_bytes: Device memory in use, by anybody.
        power_w: Watts; None where the card does not tell.
        energy_j: Joules since the driver was loaded; None on cards before Volta.
        temperature_c: Of the GPU; None where the card does not tell.
    """

    at_s: float
    memory_used_bytes: int
    power_w: float | None = None
    energy_j: float | None = None
    temperature_c: int | None = None


@dataclass
class Samples:
    """Readings, oldest first: the time series of a run."""

    readings: list[Reading] = field(default_factory=list)

    @property
    def peak_memory_bytes(self) -> int | None:
        """Most device memory in use at any reading: a peak between two readings is missed."""
        return max((reading.memory_used_bytes for reading in self.readings), default=None)

    @property
    def seconds(self) -> float:
        """From the first reading to the last."""
        return self.readings[-1].at_s - self.readings[0].at_s if self.readings else 0.0

    @property
    def energy_j(self) -> float | None:
        """Joules between the first and the last reading; None where the card does not tell.

        The card's own counter where there is one; else the power, integrated by trapezoids.
        """
        if len(self.readings) < 2:
            return None
        first, last = self.readings[0], self.readings[-1]
        if first.energy_j is not None and last.energy_j is not None:
            return last.energy_j - first.energy_j
        total = 0.0
        for left, right in zip(self.readings, self.readings[1:], strict=False):
            if left.power_w is None or right.power_w is None:
                return None
            total += (right.at_s - left.at_s) * (left.power_w + right.power_w) / 2
        return total


@contextlib.contextmanager
def sampling(read: Callable[[], Reading], interval_s: float = INTERVAL_S) -> Iterator[Samples]:
    """Read at once, then every `interval_s` seconds, and once more at the end.

    Raises:
        Exception: What `read` raised in the thread; raised when the block ends.
    """
    samples = Samples([read()])
    done, faults = threading.Event(), []

    def run() -> None:
        try:
            while not done.wait(interval_s):
                samples.readings.append(read())
        except Exception as error:  # a series that stopped half-way must not pass for a whole one
            faults.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()
    if faults:
        raise faults[0]
    samples.readings.append(read())


@contextlib.contextmanager
def device_samples(interval_s: float = INTERVAL_S) -> Iterator[Samples]:
    """Sample this process's first CUDA device; no readings where there is none."""
    with nvml_device() as device:
        if device is None:
            yield Samples()
            return
        nvml, handle = device

        def ask(name: str, *arguments: int) -> int | None:
            try:
                value: int = getattr(nvml, name)(handle, *arguments)
            except nvml.NVMLError:
                return None
            return value

        def read() -> Reading:
            power, energy = (
                ask(f"nvmlDeviceGet{name}") for name in ("PowerUsage", "TotalEnergyConsumption")
            )
            return Reading(
                at_s=time.monotonic(),
                memory_used_bytes=int(nvml.nvmlDeviceGetMemoryInfo(handle).used),
                power_w=None if power is None else power / 1e3,  # milliwatts
                energy_j=None if energy is None else energy / 1e3,  # millijoules
                temperature_c=ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
            )

        with sampling(read, interval_s) as samples:
            yield samples
