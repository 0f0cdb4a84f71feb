"""Measures an engine with `trtllm-bench` 1.2.1, on this machine or in the build image.

Sources, all NVIDIA/TensorRT-LLM: `bench/benchmark/throughput.py` (56851033), `low_latency.py`
(89fd9b74), `commands/bench.py` (8b13f594), `bench/utils/data.py` (a6ad8019), and of the report
`bench/dataclasses/reporting.py` (2787769c) and `statistics.py` (77d7fe1e). The options are listed
in `tests/runners/trtllm_bench_options.json`. It measures in the client, around the LLM class, so
Python's share of the time counts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pipeline.core.errors import PipelineError
from pipeline.core.safetensors_files import SINGLE, TensorSpec, safetensors_header
from pipeline.core.values import Engine
from pipeline.formats.trtllm.spec import BENCH_PROGRAM, VERSION
from pipeline.quant.unified import UnifiedCheckpoint, copy_companions
from pipeline.runners.runner import BenchRun
from pipeline.runners.workload import Workload

Mode = Literal["throughput", "latency"]
_FIGURES = {
    "output_tokens_per_s": "performance.system_output_throughput_tok_s",
    "ttft_ms": "streaming_metrics.avg_ttft_ms",
    "itl_ms": "streaming_metrics.avg_tpot_ms",
}


def write_inputs(
    folder: Path,
    engine: Engine,
    checkpoint_dir: Path,
    workload: Workload,
    *,
    rounds: int,
    seed: int,
    kv_cache_fraction: float,
) -> None:
    """Write all that the tool reads, beside the engine.

    Args:
        folder: Gets `model`, `dataset.jsonl`, and `options.yaml` where there is a window.
        engine: What is measured.
        checkpoint_dir: The unified checkpoint that it was made from, for the model's config.
        workload: The load.
        rounds: Batches of one run, one after the other.
        seed: Of the prompts.
        kv_cache_fraction: As of the runner.
    """
    write_model_dir(folder / "model", checkpoint_dir=checkpoint_dir, engine_dir=engine.dir)
    vocab_size = UnifiedCheckpoint(checkpoint_dir).spec.vocab_size
    dataset = folder / "dataset.jsonl"
    write_dataset(dataset, workload, vocab_size=vocab_size, seed=seed, rounds=rounds)
    window = attention_window(engine)
    if window is not None:  # the section replaces the tool's own, so it repeats what that sets
        cache = {
            "free_gpu_memory_fraction": kv_cache_fraction,
            "enable_block_reuse": False,
            "max_attention_window": [window],
        }
        options = json.dumps({"kv_cache_config": cache})  # JSON is YAML
        (folder / "options.yaml").write_text(options + "\n")


def attention_window(engine: Engine) -> int | None:
    """The sliding window that the runtime needs; None where the context stays inside it.

    TensorRT-LLM's engines do not hold it (pipeline.formats.trtllm).
    """
    window: int | None = engine.checks.get("conversion", {}).get("attention_window")
    return window if window is not None and engine.limits.max_seq_len > window else None


def mode_of(workload: Workload) -> Mode:
    """`latency` for one request at a time: it sets the runtime up for that; else `throughput`."""
    return "latency" if workload.batch == 1 else "throughput"


def bench_command(
    workload: Workload,
    *,
    rounds: int,
    warmup: int,
    kv_cache_fraction: float,
    given: str,
    made: str,
    engine_dir: str,
    options: bool,
) -> tuple[str, ...]:
    """Program and arguments, never a shell string.

    `throughput` streams, so that times to tokens are known; `latency` always does. End-of-sequence
    is off in both, and `--max_seq_len` must not be given for an engine.

    Args:
        workload: What to measure.
        rounds: Batches of one run.
        warmup: Requests before them.
        kv_cache_fraction: As of the runner.
        given: Folder of what `write_inputs` writes, as the tool sees it.
        made: Folder of what the tool writes.
        engine_dir: The engine.
        options: Whether there are options of the LLM class.
    """
    mode = mode_of(workload)
    command = [
        BENCH_PROGRAM,
        *("--model", workload.name),
        *("--model_path", f"{given}/model"),
        *("--workspace", f"{made}/workspace"),
        *("--log_level", "info"),
        mode,
        *("--backend", "tensorrt"),  # the default is pytorch
        *("--engine_dir", engine_dir),
        *("--dataset", f"{given}/dataset.jsonl"),
        *("--num_requests", str(workload.batch * rounds)),
        *("--concurrency", str(workload.batch)),
        *("--warmup", str(warmup)),
        *("--kv_cache_free_gpu_mem_fraction", str(kv_cache_fraction)),
        *("--report_json", f"{made}/report.json"),
    ]
    if mode == "throughput":
        command += ["--eos_id", "-1", "--streaming"]
    if options:
        command += ["--extra_llm_api_options", f"{given}/options.yaml"]
    return tuple(command)


def write_dataset(
    path: Path, workload: Workload, *, vocab_size: int, seed: int, rounds: int
) -> None:
    """Write one JSON line for each request: `task_id`, `input_ids`, `output_tokens`.

    The same arguments give the same bytes. Every round has prompts of its own, so that no prefix
    is ever found in the cache.
    """
    with path.open("w", encoding="ascii") as stream:
        for number in range(rounds):
            prompts = workload.request_prompts(vocab_size, seed + number)
            for row, prompt in enumerate(prompts):
                request = {
                    "task_id": number * workload.batch + row,
                    "input_ids": prompt,
                    "output_tokens": workload.osl,
                }
                stream.write(json.dumps(request) + "\n")


def write_model_dir(folder: Path, *, checkpoint_dir: Path, engine_dir: Path) -> None:
    """Fill the folder for `--model_path`: a Hugging Face config, a tokenizer, and one tensor.

    `trtllm-bench` loads the tokenizer although the dataset is tokenized, and reads the model's
    config and its safetensors headers to count parameters, of which it makes use for its PyTorch
    backend only (`ModelConfig.from_hf` in bench/build/dataclasses.py). The engine's own
    `config.json` is of another kind. `auto_map` would make it look for the model's Python files.
    """
    folder.mkdir()
    copy_companions(engine_dir, folder)
    for source in (checkpoint_dir / "config.json", folder / "tokenizer_config.json"):
        if source.is_file():
            content = json.loads(source.read_text())
            content.pop("auto_map", None)
            content.pop("quantization_config", None)
            (folder / source.name).write_text(json.dumps(content, indent=1) + "\n")
    unused = TensorSpec("unused", "float32", (1,))
    weights = safetensors_header([unused]) + bytes(unused.size_bytes)
    (folder / SINGLE).write_bytes(weights)


def read_report(
    document: Mapping[str, Any], workload: Workload, *, rounds: int, quant_algo: str | None
) -> BenchRun:
    """The figures of one run.

    - `output_tokens_per_s`: output tokens of all requests over the time from the first start to the
      last end; with one round that of acceptance's own clock.
    - `ttft_ms`: mean over requests, from submission to the first token.
    - `itl_ms`: mean over requests of (end - first token) / (osl - 1).

    Raises:
        PipelineError: Another engine, other requests or other lengths than asked for, or a figure
            that is none; lists all of it.
    """
    faults = list(_faults(document, workload, rounds, quant_algo))
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
    return BenchRun(
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


def _faults(
    document: Mapping[str, Any], workload: Workload, rounds: int, quant_algo: str | None
) -> Iterator[str]:
    wanted: tuple[tuple[str, Any], ...] = (
        ("engine.backend", "TRT"),
        ("engine.version", VERSION),
        ("engine.quantization", quant_algo),
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
