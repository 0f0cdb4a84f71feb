"""A sustained run: one workload again and again for minutes, with the card's state beside it."""

from __future__ import annotations

import bisect
import logging
import time
from collections.abc import Callable
from typing import Any

from pydantic import NonNegativeFloat, PositiveFloat
from pydantic.dataclasses import dataclass

from pipeline.acceptance.sampler import Samples, device_samples
from pipeline.acceptance.sustained import Sample, SustainedLimits
from pipeline.acceptance.workload import Workload
from pipeline.progress import progress
from pipeline.runners.session import Session
from pipeline.settings import STRICT

log = logging.getLogger(__name__)

_INTERVAL_S = 0.5


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SustainedRun:
    """How long, and what it may lose; see `SustainedLimits` for where the defaults come from.

    Only a card is put under sustained load, not the CPU that stands in for one.

    Attributes:
        minutes: Length; 0 for none.
        workload: Name of the target that is repeated; empty for the one with the largest batch.
        max_throughput_drop: Allowed loss of throughput, first against last window.
        max_memory_growth_mib: Allowed growth of device memory, MiB.
        clear_cache: Free the allocator's cache between batches, where the runner can: a leak that
            this hides is one of the allocator's. Changes nothing that is computed.
    """

    minutes: NonNegativeFloat = 0.0
    workload: str = ""
    max_throughput_drop: PositiveFloat = 0.05
    max_memory_growth_mib: PositiveFloat = 20.0
    clear_cache: bool = False

    @property
    def limits(self) -> SustainedLimits:
        """Windows that fit the length: of 20 minutes one of warm-up, two of each window.

        Raises:
            ValueError: There is no sustained run.
        """
        seconds = 60.0 * self.minutes
        if not seconds:
            raise ValueError("acceptance.sustained.minutes is 0")
        return SustainedLimits(
            max_throughput_drop=self.max_throughput_drop,
            max_memory_growth_bytes=int(self.max_memory_growth_mib * 2**20),
            warm_up_s=min(60.0, seconds / 12),
            window_s=min(120.0, seconds / 4),
            min_duration_s=0.8 * seconds,
        )

    def chosen(self, workloads: tuple[Workload, ...]) -> Workload | None:
        """The workload that is repeated; None where there is none of that name."""
        if not self.workload:
            return max(workloads, key=lambda load: load.batch, default=None)
        return next((load for load in workloads if load.name == self.workload), None)


def run_sustained(
    session: Session,
    workload: Workload,
    asked: SustainedRun,
    *,
    vocab_size: int,
    seed: int,
    clock: Callable[[], float] = time.monotonic,
) -> list[Sample]:
    """Repeat a workload until the time is over; one sample for each batch.

    A batch is never cut short, so the run is longer than asked by less than one batch.
    """
    prompts = [list(one) for one in workload.request_prompts(vocab_size, seed)][: workload.batch]
    clear = getattr(session, "clear_cache", None) if asked.clear_cache else None
    if asked.clear_cache and clear is None:
        log.warning("acceptance.sustained.clear_cache: this runner has no cache that we can clear")
    seconds = 60.0 * asked.minutes
    taken: list[tuple[float, float]] = []
    session.generate(prompts, workload.osl)  # compiles, allocates
    with (
        device_samples(_INTERVAL_S) as readings,
        progress("Sustained run", int(seconds), "s") as done,
    ):
        started = clock()
        told = 0
        while (now := clock() - started) < seconds:
            session.generate(prompts, workload.osl)
            if clear is not None:
                clear()
            ended = clock() - started
            taken.append((ended, workload.batch * workload.osl / (ended - now)))
            done(min(int(ended), int(seconds)) - told)
            told = min(int(ended), int(seconds))
    return [_sample(started, at_s, rate, readings) for at_s, rate in taken]


def _sample(started: float, at_s: float, rate: float, readings: Samples) -> Sample:
    """A batch, with the last reading of the card before its end."""
    times = [reading.at_s for reading in readings.readings]
    index = bisect.bisect_right(times, started + at_s) - 1
    beside: dict[str, Any] = {}
    if index >= 0:
        reading = readings.readings[index]
        beside = {
            "memory_bytes": reading.memory_used_bytes,
            "temperature_c": reading.temperature_c,
            "power_w": reading.power_w,
        }
    return Sample(t_s=round(at_s, 3), output_tokens_per_s=round(rate, 2), **beside)
