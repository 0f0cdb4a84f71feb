"""Reads the report of `trtllm-bench` into the pipeline's own speed figures; pure.

Keys: `ReportUtility.get_statistics_dict` in bench/dataclasses/reporting.py (2787769c), what they
mean: bench/dataclasses/statistics.py (77d7fe1e). It measures in the client, around the LLM class,
so Python's share of the time counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.acceptance.speed import SpeedSample
from pipeline.core.errors import PipelineError
from pipeline.formats.trtllm.release import VERSION
from pipeline.runners.workload import Workload

_FIGURES = {
    "output_tokens_per_s": "performance.system_output_throughput_tok_s",
    "ttft_ms": "streaming_metrics.avg_ttft_ms",
    "itl_ms": "streaming_metrics.avg_tpot_ms",
}


def read_report(document: Mapping[str, Any], workload: Workload, *, rounds: int) -> SpeedSample:
    """The figures of one run.

    - `output_tokens_per_s`: output tokens of all requests over the time from the first start to the
      last end; with one round the definition of `SpeedSample`.
    - `ttft_ms`: mean over requests, from submission to the first token.
    - `itl_ms`: mean over requests of (end - first token) / (osl - 1), as in `SpeedSample`.

    Raises:
        PipelineError: Another engine, other requests or other lengths than asked for, or a figure
            that is none; lists all of it.
    """
    faults = list(_faults(document, workload, rounds))
    figures = {name: _at(document, path) for name, path in _FIGURES.items()}
    faults += [
        f"  {_FIGURES[name]} is {value!r}, wanted a positive number"
        for name, value in figures.items()
        if not _is_positive(value)
    ]
    if faults:
        lines = "\n".join(faults)
        raise PipelineError(
            f"trtllm-bench reported another run than workload {workload.name}:\n{lines}\n"
            "nothing of it is used; see its log"
        )
    return SpeedSample(
        output_tokens_per_s=float(figures["output_tokens_per_s"]),
        ttft_ms=float(figures["ttft_ms"]),
        itl_ms=float(figures["itl_ms"]),
    )


def percentiles(document: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Spread over requests, milliseconds, for the report; empty where there is none."""
    found = {}
    for name, path in (
        ("ttft_ms", "streaming_metrics.ttft_percentiles"),
        ("itl_ms", "streaming_metrics.tpot_percentiles"),
        ("request_latency_ms", "performance.request_latency_percentiles_ms"),
    ):
        values = _at(document, path)
        if isinstance(values, Mapping):
            found[name] = {
                key: round(float(values[key]), 3) for key in ("p50", "p90", "p99") if key in values
            }
    return found


def _faults(document: Mapping[str, Any], workload: Workload, rounds: int) -> Iterator[str]:
    wanted: tuple[tuple[str, Any], ...] = (
        ("engine.backend", "TRT"),
        ("engine.version", VERSION),
        ("engine.quantization", "FP8"),
        ("world_info.world_size", 1),
        ("request_info.num_requests", workload.batch * rounds),
        ("request_info.avg_input_length", workload.isl),
        ("request_info.avg_output_length", workload.osl),
    )
    for path, value in wanted:
        found = _at(document, path)
        if found != value:
            yield f"  {path} is {found!r}, wanted {value!r}"
    batch = _at(document, "world_info.max_batch_size")
    if not isinstance(batch, int) or batch < workload.batch:
        yield f"  world_info.max_batch_size is {batch!r}, wanted {workload.batch} or more"


def _at(document: Mapping[str, Any], path: str) -> Any:
    node: Any = document
    for part in path.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def _is_positive(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0
