"""What a batch in vLLM took: per request, and as the figures of a report.

Source of the raw times: `RequestOutput.metrics` of vLLM 0.24.0, which is a `RequestStateStats`
(vllm/v1/metrics/stats.py). It has no time of single tokens, so the gaps between the tokens of one
request are known by their mean only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.runners.session import Generation

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, kw_only=True)
class RequestTiming:
    """One request.

    Attributes:
        ttft_ms: `first_token_latency`, in milliseconds: from the arrival at the engine's front end
            to the first token there. Waiting for other requests of the batch is in it.
        request_latency_ms: ttft_ms + (last_token_ts - first_token_ts), in milliseconds: to the
            last token. The difference is of the engine's monotonic clock.
        itl_ms: (last_token_ts - first_token_ts) / (tokens - 1), in milliseconds: the mean gap
            between the tokens of this request; None if it has one token. vLLM's benchmark calls
            it TPOT.
        arrival_s: When it arrived, seconds after the first; None where all started together. The
            times above count from there, so that a request's waiting in a queue is in them.
    """

    ttft_ms: float
    request_latency_ms: float
    itl_ms: float | None
    arrival_s: float | None = None

    @staticmethod
    def of(metrics: Mapping[str, Any], arrival_s: float | None = None) -> RequestTiming:
        """From the fields of a `RequestStateStats`."""
        ttft_ms = 1e3 * float(metrics["first_token_latency"])
        decode_ms = 1e3 * (float(metrics["last_token_ts"]) - float(metrics["first_token_ts"]))
        gaps = int(metrics["num_generation_tokens"]) - 1
        return RequestTiming(
            ttft_ms=ttft_ms,
            request_latency_ms=ttft_ms + decode_ms,
            itl_ms=decode_ms / gaps if gaps > 0 else None,
            arrival_s=arrival_s,
        )


@dataclass(frozen=True, kw_only=True)
class VllmGeneration(Generation):
    """A batch with the time of each of its requests.

    `ttft_s` is that of the slowest request: then every request has its first token. `total_s` is
    the time of the call of `LLM.generate`, from token ids to token ids.

    Attributes:
        requests: In the order of the prompts.
    """

    requests: tuple[RequestTiming, ...]

    @property
    def output_tokens_per_s(self) -> float:
        """New tokens of all requests / total_s: prefill included."""
        return self.output_tokens / self.total_s

    def total_tokens_per_s(self, isl: int) -> float:
        """(Batch x isl + new tokens) / total_s: prompt tokens count too."""
        return (len(self.tokens) * isl + self.output_tokens) / self.total_s


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
