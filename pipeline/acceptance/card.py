"""Holds a card for one measurement: alone, its state before and after, and sampled meanwhile."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from pipeline.core.errors import IncompatibleError
from pipeline.core.gpu import Conditions, nvml_device, read_conditions
from pipeline.core.hardware import card_name
from pipeline.core.settings import cache_root
from pipeline.core.values import Finding
from pipeline.core.workfolder import hold_lock

_SETTLE_S = 15.0
"""A process that has ended may still be in NVML's list for a moment, and its work in the
utilization; seen on an H100: below 2 s."""
_SLOWED = frozenset(
    {"hw_slowdown", "sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown"}
)
"""Heat or a failing supply. The power cap is no fault: under full load a card sits at it."""
_MAX_IDLE_UTILIZATION_PERCENT = 5
"""A desktop on the card draws now and then; work of another process is far above that."""
SAMPLE_S = 0.1
"""NVML's power is an average over 25 ms or more, by card: a shorter interval tells nothing new."""


@dataclass
class HeldCard:
    """A card while it is held: before anything ran, and when everything of ours had ended."""

    before: Conditions
    after: Conditions | None = None

    @property
    def card(self) -> str:
        return card_name(self.before.gpu)

    def findings(self) -> tuple[Finding, ...]:
        return () if self.after is None else tuple(condition_findings(self.before, self.after))


@contextlib.contextmanager
def held_card() -> Iterator[HeldCard]:
    """Hold the card, and note its state at both ends; IncompatibleError if there is none."""
    seen = read_conditions()
    if seen is None:
        raise IncompatibleError("no CUDA device: NVML shows this process none; see nvidia-smi")
    with gpu_lock(seen.uuid):
        held = HeldCard(before=_settle())
        yield held
        held.after = _settle()


def gpu_lock(uuid: str) -> AbstractContextManager[None]:
    """Hold the card for one measurement of this user; waits for another one."""
    return hold_lock(cache_root() / "locks" / f"gpu-{uuid}.lock")


def _settle() -> Conditions:
    """The card's state, once processes that have just ended are gone from what NVML shows."""
    deadline = time.monotonic() + _SETTLE_S
    while True:
        found = read_conditions()
        if found is None:
            raise IncompatibleError("the CUDA device is gone; see nvidia-smi and dmesg")
        if disturbance(found) is None or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def disturbance(idle: Conditions) -> str | None:
    """What else uses the card while nothing of ours runs, as NVML shows it; None for nothing."""
    if idle.other_compute_processes:
        pids = ", ".join(str(process.pid) for process in idle.other_compute_processes)
        return f"other compute processes were on {idle.gpu} (pid {pids})"
    if (idle.utilization_percent or 0) > _MAX_IDLE_UTILIZATION_PERCENT:
        return (
            f"{idle.gpu} was {idle.utilization_percent}% busy with work that is not ours, of "
            "processes that this container hides or of the display"
        )
    return None


def condition_findings(before: Conditions, after: Conditions) -> Iterator[Finding]:
    """Why a measurement is `inconclusive` as not of this engine alone on this card, and notes."""
    if before.uuid != after.uuid:
        yield Finding(
            "inconclusive",
            f"the card changed from {before.uuid} to {after.uuid}; measure again on one",
        )
        return
    for when, moment in (("before", before), ("after", after)):
        if found := disturbance(moment):
            yield Finding(
                "inconclusive", f"{when} the measurement {found}; end them and measure again"
            )
    errors = (after.ecc_uncorrected or 0) - (before.ecc_uncorrected or 0)
    if errors > 0:
        yield Finding(
            "inconclusive",
            f"{errors} memory errors that ECC could not correct during the measurement; "
            f"see nvidia-smi -q -d ECC, have {after.gpu} checked",
        )
    reasons = {*(before.throttle_reasons or ()), *(after.throttle_reasons or ())}
    if slowed := sorted(reasons & _SLOWED):
        yield Finding(
            "note",
            f"the card slowed itself down ({', '.join(slowed)}; {before.temperature_c} C "
            f"before, {after.temperature_c} C after); see to its cooling and supply",
        )
    limit, own = after.power_limit_w, after.power_limit_default_w
    if limit is not None and own is not None and limit < own:
        yield Finding("note", f"the power limit is {limit:.0f} W, the card's own is {own:.0f} W")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The card at one moment of a monotonic clock; None where it does not tell.

    `memory_used_bytes` is of all processes, `energy_j` since the driver was loaded.
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
        return self.readings[-1].at_s - self.readings[0].at_s if self.readings else 0.0

    @property
    def energy_j(self) -> float | None:
        """Joules between the first and the last reading, by the card's own counter."""
        ends = [reading.energy_j for reading in (*self.readings[:1], *self.readings[-1:])]
        if len(self.readings) < 2 or ends[0] is None or ends[1] is None:
            return None
        return ends[1] - ends[0]


@contextlib.contextmanager
def sampling(read: Callable[[], Reading], interval_s: float = SAMPLE_S) -> Iterator[Samples]:
    """Read at once, then every `interval_s` seconds, and once more at the end; or raise then."""
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
def device_samples(interval_s: float = SAMPLE_S) -> Iterator[Samples]:
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
