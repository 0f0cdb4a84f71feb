"""A sustained run, judged: does throughput fall, does memory grow? Pure: samples in, findings out.

Both figures are robust, because one slow second or one late allocation is neither throttling nor a
leak. Throughput is compared between the medians of a first and a last window; memory by the median
of the slopes between all pairs of samples (`pipeline.acceptance.slope`).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.acceptance.slope import theil_sen_slope
from pipeline.core.values import Finding


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What was seen in one interval.

    Attributes:
        t_s: Seconds since the run began, at the end of the interval.
        output_tokens_per_s: Output tokens of the interval over its length, all requests together.
        memory_bytes: Device memory in use at its end; None where it cannot be read.
        temperature_c: Of the GPU, degrees Celsius; None where it cannot be read.
        power_w: Of the card, watts; None where it cannot be read.
    """

    t_s: float
    output_tokens_per_s: float
    memory_bytes: int | None = None
    temperature_c: float | None = None
    power_w: float | None = None


@dataclass(frozen=True, kw_only=True)
class SustainedLimits:
    """What a sustained run may lose, and how much of one is needed to say so.

    Attributes:
        max_throughput_drop: Allowed loss from the first to the last window; 0.05 is five percent.
            The gate is there for a throttling RTX 4090, said to lose 15 % in 20 minutes (we know
            no published measurement); a third of that leaves room for noise on both sides.
        max_memory_growth_bytes: Allowed growth over the judged part, by the slope. PyTorch's
            allocator takes memory in segments of 2 MiB and 20 MiB (kSmallBuffer, kLargeBuffer in
            c10/cuda/CUDACachingAllocator), so one segment of 20 MiB is no leak yet.
        warm_up_s: Seconds at the start that are dropped.
        window_s: Length of the first and of the last window.
        min_duration_s: Least length of the judged part; at least two windows.
        min_window_samples: Least number of samples in each window.
    """

    max_throughput_drop: float
    max_memory_growth_bytes: int
    warm_up_s: float
    window_s: float
    min_duration_s: float
    min_window_samples: int = 5


@dataclass(frozen=True, kw_only=True)
class SustainedFigures:
    """A sustained run in numbers.

    Attributes:
        duration_s: Length of the judged part.
        first_tokens_per_s: Median throughput of the first window.
        last_tokens_per_s: Median throughput of the last window.
        throughput_drop: 1 - last / first; negative where it became faster.
        memory_growth_bytes: Slope x duration; None where memory was not read in the whole run.
    """

    duration_s: float
    first_tokens_per_s: float
    last_tokens_per_s: float
    throughput_drop: float
    memory_growth_bytes: float | None


def sustained_figures(samples: Sequence[Sample], limits: SustainedLimits) -> SustainedFigures | str:
    """The figures of a run, or in words why it is not enough of one."""
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
    return SustainedFigures(
        duration_s=duration_s,
        first_tokens_per_s=before,
        last_tokens_per_s=after,
        throughput_drop=(before - after) / before,
        memory_growth_bytes=_memory_growth(judged, duration_s),
    )


def judge_sustained(samples: Sequence[Sample], limits: SustainedLimits) -> tuple[Finding, ...]:
    """Findings of a sustained run; none for a healthy one.

    Returns:
        `rejected` for a drop or a growth beyond the limit, `inconclusive` for a run that is too
        short or too thinly sampled, a note where memory could not be judged.
    """
    figures = sustained_figures(samples, limits)
    if isinstance(figures, str):
        return (Finding(kind="inconclusive", message=f"sustained run: {figures}"),)
    findings = []
    if figures.throughput_drop > limits.max_throughput_drop:
        message = (
            f"sustained run: {figures.first_tokens_per_s:.1f} tok/s fell to "
            f"{figures.last_tokens_per_s:.1f} ({figures.throughput_drop:.1%}) in "
            f"{figures.duration_s / 60:.1f} minutes, {limits.max_throughput_drop:.1%} allowed: "
            "look at the temperatures and throttle reasons of the same run"
        )
        findings.append(Finding(kind="rejected", message=message))
    growth = figures.memory_growth_bytes
    if growth is None:
        message = "sustained run: device memory was not read throughout; its growth is not judged"
        findings.append(Finding(kind="note", message=message))
    elif growth > limits.max_memory_growth_bytes:
        message = (
            f"sustained run: memory grew by {growth / 2**20:.1f} MiB in "
            f"{figures.duration_s / 60:.1f} minutes "
            f"({growth / 2**20 * 3600 / figures.duration_s:.0f} MiB an hour), "
            f"{limits.max_memory_growth_bytes / 2**20:.1f} MiB allowed: a leak in the runtime, or "
            "a cache that has no bound"
        )
        findings.append(Finding(kind="rejected", message=message))
    return tuple(findings)


def sustained_json(
    samples: Sequence[Sample],
    limits: SustainedLimits,
    workload: str,
    cleared: Sequence[Sample] | None = None,
) -> Mapping[str, Any]:
    """The report's `sustained`: workload, limits, figures (null for too little of a run), samples.

    Args:
        samples: Of the run that is judged.
        limits: What it is judged by.
        workload: Its name.
        cleared: Of the second run, the allocator's cache freed after each batch; None without one.
    """
    document = {
        "workload": workload,
        "limits": asdict(limits),
        **_run_json(samples, limits),
    }
    if cleared is not None:
        effect = _effect(samples, cleared, limits)
        document["cache_cleared"] = {**_run_json(cleared, limits), "effect": effect}
    return document


def _run_json(samples: Sequence[Sample], limits: SustainedLimits) -> dict[str, Any]:
    """Figures of one run, null for too little of one, and its samples without what is not known."""
    figures = sustained_figures(samples, limits)
    known = [{name: v for name, v in asdict(one).items() if v is not None} for one in samples]
    return {"figures": None if isinstance(figures, str) else asdict(figures), "samples": known}


def _effect(
    samples: Sequence[Sample], cleared: Sequence[Sample], limits: SustainedLimits
) -> dict[str, float | None]:
    """What clearing changed, medians after the warm-up: with it against without it.

    `throughput_change` is a share, negative where clearing costs; `memory_change_bytes` is null
    where memory was not read throughout. Both are null without samples after the warm-up.
    """
    changes: dict[str, float | None] = {"throughput_change": None, "memory_change_bytes": None}
    kept = [[s for s in run if s.t_s >= limits.warm_up_s] for run in (samples, cleared)]
    if not all(kept):
        return changes
    before, after = (statistics.median(s.output_tokens_per_s for s in run) for run in kept)
    if before > 0:
        changes["throughput_change"] = after / before - 1
    memory = [[s.memory_bytes for s in run if s.memory_bytes is not None] for run in kept]
    if all(len(known) == len(run) for known, run in zip(memory, kept, strict=True)):
        changes["memory_change_bytes"] = statistics.median(memory[1]) - statistics.median(memory[0])
    return changes


def _memory_growth(judged: Sequence[Sample], duration_s: float) -> float | None:
    """Theil-Sen slope of memory times the duration; None if any sample has no memory."""
    points = [(s.t_s, s.memory_bytes) for s in judged if s.memory_bytes is not None]
    if len(points) < len(judged):
        return None
    return theil_sen_slope(points) * duration_s
