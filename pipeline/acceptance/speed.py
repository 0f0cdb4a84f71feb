"""Speed of a session on a workload, and of others beside it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.acceptance.sampler import device_samples
from pipeline.acceptance.speed_sample import SpeedSample, device_figures
from pipeline.core.values import Finding
from pipeline.runners.session import BatchOptions, RequestTiming, Session
from pipeline.runners.workload import Workload

ENGINE = "engine"
PERCENTILES = (50, 90, 99)
Wave = tuple[list[list[int]], BatchOptions | None]
Waves = Sequence[Wave]


def measure_speed(
    workload: Workload, contenders: Mapping[str, Session], waves: Waves, repeats: int
) -> dict[str, list[SpeedSample]]:
    """Time every contender on the same prompts.

    They alternate, and who begins changes from round to round (ABBA), so that drift hits all alike.
    `workload.warm_ups` runs of each are discarded. While one runs, the card is sampled, where there
    is one.

    Args:
        workload: The load.
        contenders: Name -> what is measured; `engine` is the one that ships.
        waves: Of the workload: what each run gives the session.
        repeats: Timed runs of each.

    Raises:
        PipelineError: A run gave too few tokens, or times that no run can have.
    """
    samples: dict[str, list[SpeedSample]] = {name: [] for name in contenders}
    for run in range(workload.warm_ups + repeats):
        order = list(contenders.items())
        for name, session in order if run % 2 == 0 else reversed(order):
            sample = _timed(session, waves, workload.osl)
            if run >= workload.warm_ups:
                samples[name].append(sample)
    return samples


def _timed(session: Session, waves: Waves, osl: int) -> SpeedSample:
    """One run; a warm-up is held to its number of tokens too."""
    with device_samples() as readings:
        made = [session.generate(prompts, osl, options) for prompts, options in waves]
    return SpeedSample.of_waves(made, waves, osl, device=readings if readings.readings else None)


def summarize(workload: Workload, runs: Sequence[SpeedSample]) -> dict[str, Any]:
    """One entry of the report's `speed`: medians, spread, raw samples.

    Where the runtime keeps the times of single requests, `ttft_ms`, `itl_ms` and
    `request_latency_ms` are p50, p90 and p99 over all requests of all runs, as
    `latency_percentiles` has them; else the first two are the median over the runs.
    """
    entry: dict[str, Any] = {
        "workload": workload.name,
        "workload_digest": workload.digest,
        "batch": workload.batch,
        "isl": workload.isl,
        "osl": workload.osl,
        **_medians(runs),
        **latency_percentiles([request for run in runs for request in run.requests]),
        **device_figures(runs),
        "min_output_tokens_per_s": workload.min_output_tokens_per_s,
        **_rates(runs),
        "runs": [run.to_json() for run in runs],
    }
    if not workload.is_plain:
        entry["load"] = workload.load
        read = runs[0].prompt_tokens
        if read is not None:  # `isl` is the longest prompt, a ceiling needs their mean
            entry["mean_isl"] = round(read / workload.total_requests, 3)
        if not workload.lengths_are_known_and_equal:
            made = sum(run.output_tokens or 0 for run in runs)
            entry["mean_osl"] = round(made / len(runs) / workload.total_requests, 3)
    if workload.request_rate is not None:
        achieved = [run.achieved_request_rate for run in runs]
        entry["request_rate"] = {
            "asked": workload.request_rate,
            "achieved": round(statistics.median(rate for rate in achieved if rate is not None), 3),
        }
    return entry


def latency_percentiles(requests: Sequence[RequestTiming]) -> dict[str, dict[str, float]]:
    """Name -> `p50`, `p90`, `p99` over requests, in milliseconds; no name without values.

    Linear interpolation between the two nearest requests, NumPy's default; vLLM's benchmark
    (vllm/benchmarks/serve.py) uses the same. With fewer than 100 requests, p99 is close to the
    maximum.
    """
    import numpy as np

    figures = {}
    for name in ("request_latency_ms", "ttft_ms", "itl_ms"):
        values = [getattr(request, name) for request in requests]
        known = [value for value in values if value is not None]
        if known:
            found = np.percentile(known, PERCENTILES)
            figures[name] = {
                f"p{percent}": round(float(value), 3)
                for percent, value in zip(PERCENTILES, found, strict=True)
            }
    return figures


def _medians(runs: Sequence[SpeedSample]) -> dict[str, float]:
    names = ("output_tokens_per_s", "ttft_ms", "itl_ms", "total_tokens_per_s")
    known = {name: [getattr(run, name) for run in runs] for name in names}
    return {
        name: round(statistics.median(values), 3)
        for name, values in known.items()
        if None not in values
    }


def _rates(runs: Sequence[SpeedSample]) -> dict[str, Any]:
    """The rate of each run, and how far they lie apart; one run has no spread."""
    rates = [run.output_tokens_per_s for run in runs]
    spread = (max(rates) - min(rates)) / statistics.median(rates)
    return {
        "samples": [round(rate, 2) for rate in rates],
        "spread": round(spread, 6) if len(rates) > 1 else None,
    }


MIN_ACHIEVED_SHARE = 0.95
"""Of the asked request rate. Below it the queue grows by more than one request in twenty that come,
and every latency is that of the run's length."""


def rate_findings(speed: Sequence[Mapping[str, Any]], *, demanded: bool) -> Iterator[Finding]:
    """Workloads whose requests came faster than they were answered.

    Args:
        speed: Entries of `summarize`.
        demanded: Whether the engine is judged by its speed here, as on the card that it is for.

    Returns:
        `rejected` for each of them, or a note where nothing is demanded.
    """
    for entry in speed:
        rate = entry.get("request_rate")
        if rate is not None and not rate["achieved"] >= MIN_ACHIEVED_SHARE * rate["asked"]:
            message = (
                f"{entry['workload']}: {rate['asked']:g} requests arrive a second, "
                f"{rate['achieved']:g} are answered: the queue grows, and the latencies are those "
                "of a queue; lower request_rate, raise batch, or take a larger card"
            )
            yield Finding(kind="rejected" if demanded else "note", message=message)


def spread_findings(speed: Sequence[Mapping[str, Any]], max_spread: float) -> Iterator[Finding]:
    """What the spread of repeated runs says about their median.

    Args:
        speed: Entries of `summarize`.
        max_spread: Largest (max - min) / median of the rates of one workload's runs; 0.1 allows
            ten percent.

    Returns:
        `inconclusive` for each workload above it; a note where there was one run only, whose
        spread is not known.
    """
    for entry in speed:
        spread, rates = entry["spread"], entry["samples"]
        if spread is None:
            message = (
                f"{entry['workload']}: {len(rates)} timed run, whose spread is not known; raise "
                "acceptance.repeats to 3 or more"
            )
            yield Finding(kind="note", message=message)
        elif not spread <= max_spread:
            message = (
                f"{entry['workload']}: the {len(rates)} runs lie {spread:.1%} apart "
                f"({min(rates):.1f} to {max(rates):.1f} tok/s), {max_spread:.1%} is allowed; end "
                "what else runs on this machine, see clocks and temperatures, and measure again"
            )
            yield Finding(kind="inconclusive", message=message)
