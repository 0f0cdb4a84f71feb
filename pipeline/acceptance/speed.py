"""Speed of a session on a workload, and of others beside it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.acceptance.card import Samples, device_samples
from pipeline.core.values import Finding
from pipeline.runners.runner import Generation, RequestTiming, Session, require_possible
from pipeline.runners.workload import BatchOptions, Workload

ENGINE = "engine"
PERCENTILES = (50, 90, 99)
Wave = tuple[list[list[int]], BatchOptions | None]
Waves = Sequence[Wave]
MIN_ACHIEVED_SHARE = 0.95
"""Of the asked request rate. Below it the queue grows by more than one request in twenty that come,
and every latency is that of the run's length."""
MAX_POINTS = 240
"""Of a Theil-Sen slope. More points are thinned evenly, the first and the last kept."""


@dataclass(frozen=True, kw_only=True)
class SpeedSample:
    """One timed run.

    Attributes:
        output_tokens_per_s: Output tokens / seconds from the start to the last of them: the
            definition of vLLM's benchmark ("output token throughput"). A batch starts with its
            prefill, an open loop with the first arrival.
        itl_ms: (total - ttft) / (longest answer - 1): the mean gap between the tokens of a request.
            Where the runtime tells the times of single requests, the mean of theirs: the first
            tokens of a large batch do not all come together.
        total_tokens_per_s: (prompt tokens + output tokens) / the same seconds.
        prompt_tokens: Of all requests.
        device: The card from the start to somewhat after the end; None where there is none.
    """

    output_tokens_per_s: float
    ttft_ms: float
    itl_ms: float
    total_tokens_per_s: float
    prompt_tokens: int
    output_tokens: int
    output_lengths: tuple[int, ...]
    achieved_request_rate: float | None
    requests: tuple[RequestTiming, ...]
    device: Samples | None

    @staticmethod
    def of_waves(
        made: Sequence[Generation], waves: Waves, osl: int, device: Samples | None = None
    ) -> SpeedSample:
        """The figures of batches that ran one after the other, as one run; latencies are means."""
        for wave, (prompts, options) in zip(made, waves, strict=True):
            require_possible(wave, prompts, osl, options)
        total_s = sum(wave.total_s for wave in made)
        new = sum(wave.output_tokens for wave in made)
        read = sum(len(prompt) for prompts, _ in waves for prompt in prompts)
        requests = tuple(request for wave in made for request in wave.requests)
        return SpeedSample(
            output_tokens_per_s=new / total_s,
            ttft_ms=1e3 * statistics.fmean(wave.ttft_s for wave in made),
            itl_ms=statistics.fmean(_itl_ms(wave) for wave in made),
            total_tokens_per_s=(read + new) / total_s,
            prompt_tokens=read,
            output_tokens=new,
            output_lengths=tuple(length for wave in made for length in (wave.lengths or ())),
            achieved_request_rate=achieved_rate(requests),
            requests=requests,
            device=device,
        )

    def to_json(self) -> dict[str, Any]:
        """The raw figures of this run, for the report; what is not known is left out."""
        figures = {
            **{name: _round(getattr(self, name)) for name in _RATES},
            "output_lengths": list(self.output_lengths) or None,
            "requests": [_request_json(one) for one in self.requests] or None,
        }
        known = {name: value for name, value in figures.items() if value is not None}
        return {**known, **device_figures([self])}


_RATES = (
    "output_tokens_per_s", "ttft_ms", "itl_ms", "total_tokens_per_s", "achieved_request_rate",
)  # fmt: skip


def _request_json(request: RequestTiming) -> dict[str, float | None]:
    return {
        name: _round(value)
        for name, value in vars(request).items()
        if name != "arrival_s" or value is not None
    }


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _itl_ms(generation: Generation) -> float:
    """See `SpeedSample.itl_ms`; 0 where every answer has one token."""
    gaps = int(generation.tokens.shape[1]) - 1
    if gaps < 1:
        return 0.0
    # A request of one token has no gap.
    known = [request.itl_ms for request in generation.requests if request.itl_ms is not None]
    if known:
        return statistics.fmean(known)
    return 1e3 * (generation.total_s - generation.ttft_s) / gaps


def measure_speed(
    workload: Workload, contenders: Mapping[str, Session], waves: Waves, repeats: int
) -> dict[str, list[SpeedSample]]:
    """Time every contender on the same prompts: name -> `repeats` runs after the warm-ups.

    Who begins changes from round to round (ABBA), so that drift hits all alike. The card is sampled
    meanwhile, where there is one. `require_possible` holds each run to what was asked.
    """
    samples: dict[str, list[SpeedSample]] = {name: [] for name in contenders}
    for run in range(workload.warm_ups + repeats):
        order = list(contenders.items())
        for name, session in order if run % 2 == 0 else reversed(order):
            with device_samples() as readings:
                made = [session.generate(asked, workload.osl, more) for asked, more in waves]
            device = readings if readings.readings else None
            sample = SpeedSample.of_waves(made, waves, workload.osl, device)
            if run >= workload.warm_ups:  # which is held to its number of tokens too
                samples[name].append(sample)
    return samples


def summarize(workload: Workload, runs: Sequence[SpeedSample]) -> dict[str, Any]:
    """One entry of the report's `speed`: medians, spread, raw samples.

    Latencies are percentiles of all requests where the runtime times them, else medians of runs.
    """
    rates = [run.output_tokens_per_s for run in runs]
    entry: dict[str, Any] = {
        "workload": workload.name,
        "workload_digest": workload.digest,
        "batch": workload.batch,
        "isl": workload.isl,
        "osl": workload.osl,
        **{
            name: round(statistics.median(getattr(run, name) for run in runs), 3)
            for name in _RATES[:4]
        },
        **latency_percentiles([request for run in runs for request in run.requests]),
        **device_figures(runs),
        "min_output_tokens_per_s": workload.min_output_tokens_per_s,
        "samples": [round(rate, 2) for rate in rates],
        "spread": None,  # of one run not known
        "runs": [run.to_json() for run in runs],
    }
    if len(rates) > 1:
        entry["spread"] = round((max(rates) - min(rates)) / statistics.median(rates), 6)
    if workload.needs:
        entry["load"] = workload.load
        # `isl` is the longest prompt, a ceiling needs their mean.
        entry["mean_isl"] = round(runs[0].prompt_tokens / workload.total_requests, 3)
        if not workload.lengths_are_known_and_equal:
            made = sum(run.output_tokens for run in runs)
            entry["mean_osl"] = round(made / len(runs) / workload.total_requests, 3)
    if workload.request_rate is not None:
        achieved = [run.achieved_request_rate for run in runs]
        entry["request_rate"] = {
            "asked": workload.request_rate,
            "achieved": round(statistics.median(rate for rate in achieved if rate is not None), 3),
        }
    return entry


def latency_percentiles(requests: Sequence[RequestTiming]) -> dict[str, dict[str, float]]:
    """Name -> `p50`, `p90`, `p99` over requests, in milliseconds; no name without values."""
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


def achieved_rate(requests: Sequence[RequestTiming]) -> float | None:
    """Requests a second that were kept up with; None where they did not arrive one by one.

    The rate of the arrivals over the Theil-Sen slope of the ends over the arrivals: 1 for a runtime
    that keeps up, however long each request takes; r / c for one that serves c of r a second. Of 60
    simulated Poisson runs of 200 requests, none at 80 % of a server's capacity came out below 95 %
    of the asked rate, and all at 120 % did.
    """
    arrivals = [request.arrival_s for request in requests if request.arrival_s is not None]
    if len(arrivals) < 2 or len(arrivals) < len(requests):
        return None
    ends = [
        arrival + request.request_latency_ms / 1e3
        for arrival, request in zip(arrivals, requests, strict=True)
    ]
    asked = (len(arrivals) - 1) / (max(arrivals) - min(arrivals))
    return asked / max(theil_sen_slope(list(zip(arrivals, ends, strict=True))), 1.0)


def device_figures(runs: Sequence[SpeedSample]) -> dict[str, Any]:
    """Memory and energy of all runs together; nothing where the card was not sampled."""
    used = [run.device for run in runs if run.device is not None]
    if not used or len(used) != len(runs):
        return {}
    figures: dict[str, Any] = {"peak_memory_bytes": max(use.peak_memory_bytes or 0 for use in used)}
    energies = [use.energy_j for use in used if use.energy_j is not None]
    seconds = sum(use.seconds for use in used)
    tokens = sum(run.output_tokens for run in runs)
    if len(energies) == len(used) and seconds > 0 and tokens > 0:
        figures["mean_power_w"] = round(sum(energies) / seconds, 2)
        figures["joules_per_token"] = round(sum(energies) / tokens, 6)
    return figures


def theil_sen_slope(points: Sequence[tuple[float, float]]) -> float:
    """Median of the slopes of y over a growing x: it bears up to 29 % of stray points.

    Source: Sen, "Estimates of the regression coefficient based on Kendall's tau", JASA 63, 1968.
    ValueError if no two points differ in x.
    """
    import numpy as np

    taken = np.linspace(0, len(points) - 1, min(len(points), MAX_POINTS)).round().astype(int)
    x, y = np.array(points, np.float64)[taken].T
    rows, columns = np.nonzero(x[:, None] < x)
    if not rows.size:
        raise ValueError("a slope needs two points that differ in x")
    return float(np.median((y[columns] - y[rows]) / (x[columns] - x[rows])))


def rate_findings(speed: Sequence[Mapping[str, Any]], *, demanded: bool) -> Iterator[Finding]:
    """`rejected`, or a note where no speed is demanded, if requests came faster than answers."""
    for entry in speed:
        rate = entry.get("request_rate")
        if rate is not None and not rate["achieved"] >= MIN_ACHIEVED_SHARE * rate["asked"]:
            message = (
                f"{entry['workload']}: {rate['asked']:g} requests arrive a second, "
                f"{rate['achieved']:g} are answered: the queue grows, and the latencies are those "
                "of a queue; lower request_rate, raise batch, or take a larger card"
            )
            yield Finding("rejected" if demanded else "note", message)


def spread_findings(speed: Sequence[Mapping[str, Any]], max_spread: float) -> Iterator[Finding]:
    """`inconclusive` for each workload whose runs lie too far apart; a note on a single run."""
    for entry in speed:
        spread, rates = entry["spread"], entry["samples"]
        if spread is None:
            message = (
                f"{entry['workload']}: {len(rates)} timed run, whose spread is not known; raise "
                "acceptance.repeats to 3 or more"
            )
            yield Finding("note", message)
        elif not spread <= max_spread:
            message = (
                f"{entry['workload']}: the {len(rates)} runs lie {spread:.1%} apart "
                f"({min(rates):.1f} to {max(rates):.1f} tok/s), {max_spread:.1%} is allowed; end "
                "what else runs on this machine, see clocks and temperatures, and measure again"
            )
            yield Finding("inconclusive", message)
