"""A sustained run: one workload again and again for minutes, the card's state beside it, judged.

Does throughput fall, does memory grow? One slow second or one late allocation is neither, so
throughput is compared between the medians of a first
and a last window; memory by the median of the slopes between all pairs of samples.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from dataclasses import dataclass as plain_dataclass
from typing import Any

from pydantic import NonNegativeFloat, PositiveFloat
from pydantic.dataclasses import dataclass

from pipeline.acceptance.card import device_samples
from pipeline.acceptance.speed import Wave, theil_sen_slope
from pipeline.core.progress import progress
from pipeline.core.settings import STRICT
from pipeline.core.values import Finding
from pipeline.runners.runner import Session, require_possible

_INTERVAL_S = 0.5


@plain_dataclass(frozen=True, kw_only=True)
class Sample:
    """A batch that ended `t_s` seconds after the start; None where the card does not tell."""

    t_s: float
    output_tokens_per_s: float
    memory_bytes: int | None = None
    temperature_c: float | None = None
    power_w: float | None = None


@plain_dataclass(frozen=True, kw_only=True)
class SustainedLimits:
    """What a sustained run may lose, and how much of one is needed, the warm-up left out."""

    max_throughput_drop: float
    max_memory_growth_bytes: int
    warm_up_s: float
    window_s: float
    min_duration_s: float
    min_window_samples: int = 5


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SustainedRun:
    """How long the largest batch is repeated, and what it may lose; on a card only.

    Attributes:
        minutes: Length; 0 for none.
        max_throughput_drop: From the first window to the last. A throttling RTX 4090 is said to
            lose 15 % in 20 minutes; a third of that leaves room for noise on both sides.
        max_memory_growth_mib: PyTorch's allocator takes segments of 2 and 20 MiB (kLargeBuffer in
            c10/cuda/CUDACachingAllocator), so one of 20 MiB is no leak yet.
    """

    minutes: NonNegativeFloat = 0.0
    max_throughput_drop: PositiveFloat = 0.05
    max_memory_growth_mib: PositiveFloat = 20.0

    @property
    def limits(self) -> SustainedLimits:
        """Windows that fit the length: of 20 minutes one of warm-up, two of each window."""
        seconds = 60.0 * self.minutes
        return SustainedLimits(
            max_throughput_drop=self.max_throughput_drop,
            max_memory_growth_bytes=int(self.max_memory_growth_mib * 2**20),
            warm_up_s=min(60.0, seconds / 12),
            window_s=min(120.0, seconds / 4),
            min_duration_s=0.8 * seconds,
        )


def run_sustained(
    session: Session,
    osl: int,
    wave: Wave,
    minutes: float,
    clock: Callable[[], float] = time.monotonic,
) -> list[Sample]:
    """Repeat a batch until the time is over; one sample for each, the last one whole.

    PipelineError if the first batch gave too few tokens, or times that no run can have.
    """
    prompts, options = wave
    seconds = 60.0 * minutes
    samples: list[Sample] = []
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
            ended = clock() - started
            last = readings.readings[-1] if readings.readings else None
            sample = Sample(
                t_s=round(ended, 3),
                output_tokens_per_s=round(made.output_tokens / (ended - now), 2),
                memory_bytes=last.memory_used_bytes if last else None,
                temperature_c=last.temperature_c if last else None,
                power_w=last.power_w if last else None,
            )
            samples.append(sample)
            done(min(int(ended), int(seconds)) - shown_s)
            shown_s = min(int(ended), int(seconds))
    return samples


def sustained_figures(samples: Sequence[Sample], limits: SustainedLimits) -> dict[str, Any] | str:
    """The report's figures of a run, or in words why it is not enough of one."""
    judged = [sample for sample in samples if sample.t_s >= limits.warm_up_s]
    duration_s = judged[-1].t_s - judged[0].t_s if judged else 0.0
    if duration_s < limits.min_duration_s:
        return (
            f"{duration_s:.0f} s after {limits.warm_up_s:.0f} s of warm-up, "
            f"{limits.min_duration_s:.0f} s are required: run it longer"
        )
    start, end = judged[0].t_s, judged[-1].t_s
    first = [s.output_tokens_per_s for s in judged if s.t_s <= start + limits.window_s]
    last = [s.output_tokens_per_s for s in judged if s.t_s >= end - limits.window_s]
    if (fewest := min(len(first), len(last))) < limits.min_window_samples:
        return (
            f"{fewest} samples in a window of {limits.window_s:.0f} s, "
            f"{limits.min_window_samples} are required: sample more often"
        )
    before, after = statistics.median(first), statistics.median(last)
    if before == 0.0:
        return "no token came in the first window after the warm-up: see the runner's log"
    memory = [(s.t_s, s.memory_bytes) for s in judged if s.memory_bytes is not None]
    known = len(memory) == len(judged)
    return {
        "duration_s": duration_s,
        "first_tokens_per_s": before,
        "last_tokens_per_s": after,
        "throughput_drop": (before - after) / before,
        "memory_growth_bytes": theil_sen_slope(memory) * duration_s if known else None,
    }


def judge_sustained(samples: Sequence[Sample], limits: SustainedLimits) -> Iterator[Finding]:
    """`rejected` for a drop or growth beyond the limit, `inconclusive` for too little of a run."""
    figures = sustained_figures(samples, limits)
    if isinstance(figures, str):
        yield Finding("inconclusive", f"sustained run: {figures}")
        return
    drop, duration_s = figures["throughput_drop"], figures["duration_s"]
    if drop > limits.max_throughput_drop:
        message = (
            f"sustained run: {figures['first_tokens_per_s']:.1f} tok/s fell to "
            f"{figures['last_tokens_per_s']:.1f} ({drop:.1%}) in "
            f"{duration_s / 60:.1f} minutes, {limits.max_throughput_drop:.1%} allowed: "
            "look at the temperatures and throttle reasons of the same run"
        )
        yield Finding("rejected", message)
    growth = figures["memory_growth_bytes"]
    if growth is None:
        message = "sustained run: device memory was not read throughout; its growth is not judged"
        yield Finding("note", message)
    elif growth > limits.max_memory_growth_bytes:
        message = (
            f"sustained run: memory grew by {growth / 2**20:.1f} MiB in "
            f"{duration_s / 60:.1f} minutes "
            f"({growth / 2**20 * 3600 / duration_s:.0f} MiB an hour), "
            f"{limits.max_memory_growth_bytes / 2**20:.1f} MiB allowed: a leak in the runtime, or "
            "a cache that has no bound"
        )
        yield Finding("rejected", message)


def sustained_json(
    samples: Sequence[Sample], limits: SustainedLimits, workload: str
) -> Mapping[str, Any]:
    """The report's `sustained`."""
    figures = sustained_figures(samples, limits)
    return {
        "workload": workload,
        "limits": asdict(limits),
        "figures": None if isinstance(figures, str) else figures,
        "samples": [{k: v for k, v in asdict(one).items() if v is not None} for one in samples],
    }
