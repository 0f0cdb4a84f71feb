"""Speed of a session on a workload, and of a baseline beside it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.acceptance.workload import Workload
from pipeline.runners.session import Generation, Session


@dataclass(frozen=True, kw_only=True)
class SpeedSample:
    """One timed run.

    Attributes:
        output_tokens_per_s: batch x osl / seconds from the start of the prefill to the last token:
            the definition of vLLM's benchmark ("output token throughput") for a closed batch.
        ttft_ms: Milliseconds to the first token of the batch.
        itl_ms: (total - ttft) / (osl - 1), in milliseconds: the mean gap between the tokens of one
            request, the first excluded.
    """

    output_tokens_per_s: float
    ttft_ms: float
    itl_ms: float

    @staticmethod
    def of(generation: Generation) -> SpeedSample:
        """The figures of one generation."""
        batch, osl = generation.tokens.shape
        decode_s = generation.total_s - generation.ttft_s
        return SpeedSample(
            output_tokens_per_s=batch * osl / generation.total_s,
            ttft_ms=1e3 * generation.ttft_s,
            itl_ms=1e3 * decode_s / max(osl - 1, 1),
        )


def measure_speed(
    workload: Workload,
    contenders: dict[str, Session],
    *,
    vocab_size: int,
    repeats: int,
    seed: int,
) -> dict[str, list[SpeedSample]]:
    """Time every contender on the same prompts; they alternate, so that drift hits all alike.

    One run of each is discarded as warm-up.
    """
    prompts = workload.prompts(vocab_size, seed).tolist()
    samples: dict[str, list[SpeedSample]] = {name: [] for name in contenders}
    for repeat in range(repeats + 1):
        for name, session in contenders.items():
            generation = session.generate(prompts, workload.osl)
            if repeat > 0:
                samples[name].append(SpeedSample.of(generation))
    return samples


def summarize(workload: Workload, samples: dict[str, list[SpeedSample]]) -> dict[str, Any]:
    """One entry of the report's `speed`: medians, raw samples, ratios to each baseline."""
    medians = {name: _medians(runs) for name, runs in samples.items()}
    engine = medians["engine"]
    entry: dict[str, Any] = {
        "workload": workload.name,
        "workload_digest": workload.digest,
        "batch": workload.batch,
        "isl": workload.isl,
        "osl": workload.osl,
        **engine,
        "min_output_tokens_per_s": workload.min_output_tokens_per_s,
        "min_ratio_to_transformers": workload.min_ratio_to_transformers,
        "samples": [round(run.output_tokens_per_s, 2) for run in samples["engine"]],
    }
    if baseline := medians.get("transformers"):
        ratio = engine["output_tokens_per_s"] / baseline["output_tokens_per_s"]
        entry["transformers"] = baseline
        entry["ratio_to_transformers"] = round(ratio, 3)
    return entry


def _medians(runs: Sequence[SpeedSample]) -> dict[str, float]:
    return {
        name: round(statistics.median(getattr(run, name) for run in runs), 3)
        for name in ("output_tokens_per_s", "ttft_ms", "itl_ms")
    }
