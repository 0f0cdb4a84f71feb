"""A sustained run: one workload again and again for minutes, with the card's state beside it."""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable
from typing import Any

from pydantic import NonNegativeFloat, PositiveFloat
from pydantic.dataclasses import dataclass

from pipeline.acceptance.sampler import Samples, device_samples
from pipeline.acceptance.speed import Wave
from pipeline.acceptance.sustained import Sample, SustainedLimits
from pipeline.core.errors import Fault, RecipeError
from pipeline.core.progress import progress
from pipeline.core.settings import STRICT
from pipeline.runners.session import CacheClearing, Session, require_possible
from pipeline.runners.workload import Workload

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
        clear_cache: Run a second time as long, the allocator's cache freed after each batch, and
            report both: what that costs in throughput, and whether it ends a growth of memory,
            which then is the allocator's and no leak. The first run is the one that is judged.
            Changes nothing that is computed. For a runner that can: see its abilities.
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
    osl: int,
    wave: Wave,
    minutes: float,
    *,
    clear: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> list[Sample]:
    """Repeat a batch until the time is over; one sample for each.

    A batch is never cut short, so the run is longer than asked by less than one batch.

    Args:
        session: What runs.
        osl: Output tokens of the longest request.
        wave: What is repeated: the first of a workload in waves; all of a run where requests
            arrive at a rate.
        minutes: How long.
        clear: Free the allocator's cache after each batch; its time counts.
        clock: Seconds of a monotonic clock.

    Raises:
        PipelineError: The first batch gave too few tokens, or times that no run can have.
        RecipeError: The session has no cache that can be cleared.
    """
    if clear and not isinstance(session, CacheClearing):
        message = "this runner has no cache that can be cleared from here; set it to false"
        raise RecipeError([Fault("acceptance.sustained.clear_cache", message)])
    prompts, options = wave
    seconds = 60.0 * minutes
    taken: list[tuple[float, float]] = []
    made = session.generate(prompts, osl, options)  # compiles, allocates
    require_possible(made, prompts, osl, options)
    with (
        device_samples(_INTERVAL_S) as readings,
        progress("Sustained run", int(seconds), "s") as done,
    ):
        started = clock()
        shown_s = 0
        while (now := clock() - started) < seconds:
            made = session.generate(prompts, osl, options)
            if clear and isinstance(session, CacheClearing):
                session.clear_cache()
            ended = clock() - started
            taken.append((ended, made.output_tokens / (ended - now)))
            done(min(int(ended), int(seconds)) - shown_s)
            shown_s = min(int(ended), int(seconds))
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
