"""The command line of `trtllm-bench` 1.2.1, its dataset, and the folder that it wants; pure files.

Sources, all NVIDIA/TensorRT-LLM: `bench/benchmark/throughput.py` (56851033), `low_latency.py`
(89fd9b74), `commands/bench.py` (8b13f594), `bench/utils/data.py` (a6ad8019). The options are listed
in `tests/runners/trtllm/trtllm_bench_options.json`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.core.safetensors_files import SINGLE, TensorSpec, safetensors_header
from pipeline.formats.trtllm.release import BENCH_PROGRAM
from pipeline.quant.export import copy_companions
from pipeline.runners.workload import Workload

Mode = Literal["throughput", "latency"]


@dataclass(frozen=True, kw_only=True)
class BenchPaths:
    """Paths as the tool sees them.

    Attributes:
        model_dir: See `write_model_dir`.
        engine_dir: The engine.
        dataset: See `write_dataset`.
        report: Gets the report.
        workspace: A folder for intermediate files.
        options: YAML with options of the LLM class; None for none.
    """

    model_dir: str
    engine_dir: str
    dataset: str
    report: str
    workspace: str
    options: str | None = None


def mode_of(workload: Workload) -> Mode:
    """`latency` for one request at a time: it sets the runtime up for that; else `throughput`."""
    return "latency" if workload.batch == 1 else "throughput"


def bench_command(
    workload: Workload,
    paths: BenchPaths,
    *,
    rounds: int,
    warmup: int,
    kv_cache_fraction: float,
) -> tuple[str, ...]:
    """Program and arguments, never a shell string.

    `throughput` streams, so that times to tokens are known; `latency` always does. End-of-sequence
    is off in both, and `--max_seq_len` must not be given for an engine.

    Args:
        workload: What to measure.
        paths: Where things are.
        rounds: Batches, one after the other.
        warmup: Requests before the measurement.
        kv_cache_fraction: Share of the memory left after loading that the KV cache gets.
    """
    mode = mode_of(workload)
    command = [
        BENCH_PROGRAM,
        *("--model", workload.name),
        *("--model_path", paths.model_dir),
        *("--workspace", paths.workspace),
        *("--log_level", "info"),
        mode,
        *("--backend", "tensorrt"),  # the default is pytorch
        *("--engine_dir", paths.engine_dir),
        *("--dataset", paths.dataset),
        *("--num_requests", str(workload.batch * rounds)),
        *("--concurrency", str(workload.batch)),
        *("--warmup", str(warmup)),
        *("--kv_cache_free_gpu_mem_fraction", str(kv_cache_fraction)),
        *("--report_json", paths.report),
    ]
    if mode == "throughput":
        command += ["--eos_id", "-1", "--streaming"]
    if paths.options is not None:
        command += ["--extra_llm_api_options", paths.options]
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
            prompts = workload.prompts(vocab_size, seed + number)
            for row, prompt in enumerate(prompts.tolist()):
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
