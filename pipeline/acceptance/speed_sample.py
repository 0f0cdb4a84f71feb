"""One timed run in figures, and what no run can have given."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.acceptance.sampler import Samples
from pipeline.acceptance.slope import theil_sen_slope
from pipeline.runners.session import (
    BatchOptions,
    Generation,
    RequestTiming,
    require_possible,
)


@dataclass(frozen=True, kw_only=True)
class SpeedSample:
    """One timed run.

    Attributes:
        output_tokens_per_s: Output tokens that were generated / seconds from the start to the last
            of them: the definition of vLLM's benchmark ("output token throughput"). A batch starts
            with its prefill, an open loop with the first arrival.
        ttft_ms: Milliseconds to the first token of the batch.
        itl_ms: (total - ttft) / (longest answer - 1), in milliseconds: the mean gap between the
            tokens of one request, the first excluded. Where the runtime tells the times of single
            requests, the mean of theirs: the first tokens of a large batch do not all come
            together.
        total_tokens_per_s: (prompt tokens + output tokens) / the same seconds; None where the
            prompts are not known.
        prompt_tokens: Of all requests; None where the prompts are not known.
        output_tokens: Of all requests; None where only figures are known.
        output_lengths: Output tokens of each request, where they may differ.
        achieved_request_rate: Requests a second that the runtime kept up with, where they arrive:
            see `achieved_rate`.
        requests: Times of each request, where the runtime tells them.
        device: The card from the start to somewhat after the end; None where there is none.
    """

    output_tokens_per_s: float
    ttft_ms: float
    itl_ms: float
    total_tokens_per_s: float | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    output_lengths: tuple[int, ...] = ()
    achieved_request_rate: float | None = None
    requests: tuple[RequestTiming, ...] = ()
    device: Samples | None = None

    @staticmethod
    def of_waves(
        made: Sequence[Generation],
        waves: Sequence[tuple[Sequence[Sequence[int]], BatchOptions | None]],
        osl: int,
        device: Samples | None = None,
    ) -> SpeedSample:
        """The figures of batches that ran one after the other, as one run.

        Tokens and seconds are added up; `ttft_ms` and `itl_ms` are means over the waves.

        Args:
            made: What the session gave back for each wave.
            waves: Prompts of each, and what they asked beyond; answers are held against both.
            osl: Output tokens of the longest request.
            device: The card meanwhile.

        Raises:
            PipelineError: Too few tokens or answers, or times that no run can have.
        """
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
        """The raw figures of this run, for the report."""
        figures: dict[str, Any] = {
            name: _rounded(getattr(self, name))
            for name in (
                "output_tokens_per_s",
                "ttft_ms",
                "itl_ms",
                "total_tokens_per_s",
                "achieved_request_rate",
            )
        }
        if self.output_lengths:
            figures["output_lengths"] = list(self.output_lengths)
        if self.requests:
            figures["requests"] = [
                {
                    name: _rounded(value)
                    for name, value in vars(request).items()
                    if name != "arrival_s" or value is not None
                }
                for request in self.requests
            ]
        if self.device:
            figures |= device_figures([self])
        return {name: value for name, value in figures.items() if value is not None}


def _itl_ms(generation: Generation) -> float:
    gaps = int(generation.tokens.shape[1]) - 1
    if gaps < 1:
        return 0.0
    # A request of one token has no gap.
    known = [request.itl_ms for request in generation.requests if request.itl_ms is not None]
    if known:
        return statistics.fmean(known)
    return 1e3 * (generation.total_s - generation.ttft_s) / gaps


def achieved_rate(requests: Sequence[RequestTiming]) -> float | None:
    """Requests a second that were kept up with; None where they did not arrive one by one.

    The rate of the arrivals over the Theil-Sen slope of the ends over the arrivals. A runtime that
    keeps up ends requests as fast as they come: slope 1, however long each takes. One that serves c
    of r a second lets a queue grow, and its ends lie r / c times as far apart. Requests over the
    seconds to the last end, vLLM's "request throughput", would blame a short run for the time that
    its last request takes.

    Of 60 simulated Poisson runs of 200 requests, none at 80 % of a server's capacity came out below
    95 % of the asked rate, and all at 120 % did; of 32 requests, 12 % and 95 %.
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
    """Memory and energy of all runs together; nothing where the card was not sampled.

    Energy, seconds and tokens are added up before they are divided: the card's counter is too
    coarse for a single short run.
    """
    used = [run.device for run in runs if run.device is not None]
    if not used or len(used) != len(runs):
        return {}
    figures: dict[str, Any] = {"peak_memory_bytes": max(use.peak_memory_bytes or 0 for use in used)}
    energies = [use.energy_j for use in used if use.energy_j is not None]
    seconds = sum(use.seconds for use in used)
    tokens = sum(run.output_tokens or 0 for run in runs)
    if len(energies) == len(used) and seconds > 0 and tokens > 0:
        figures["mean_power_w"] = round(sum(energies) / seconds, 2)
        figures["joules_per_token"] = round(sum(energies) / tokens, 6)
    return figures


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
