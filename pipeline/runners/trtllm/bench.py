"""Measures an engine with `trtllm-bench`, on this machine or in the build image."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.acceptance.speed import SpeedSample, summarize
from pipeline.core.errors import Fault, PipelineError, RecipeError
from pipeline.core.values import Engine
from pipeline.formats.trtllm.container import Shared
from pipeline.formats.trtllm.place import Place
from pipeline.formats.trtllm.release import BENCH_PROGRAM, VERSION
from pipeline.quant.unified import UnifiedCheckpoint
from pipeline.runners.trtllm.bench_command import (
    BenchPaths,
    bench_command,
    mode_of,
    write_dataset,
    write_model_dir,
)
from pipeline.runners.trtllm.bench_report import percentiles, read_report
from pipeline.runners.workload import Workload


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """How to measure.

    Attributes:
        rounds: Batches of one run, one after the other.
        warmup: Requests before them.
        kv_cache_fraction: Share of the memory left after loading that the KV cache gets.
        timeout_s: After so long a run is stopped.
        seed: Of the prompts.
    """

    rounds: int
    warmup: int
    kv_cache_fraction: float
    timeout_s: float
    seed: int


def measure(
    engine: Engine,
    checkpoint_dir: Path,
    workload: Workload,
    *,
    place: Place,
    settings: BenchSettings,
    repeats: int,
    log_path: Path,
) -> dict[str, Any]:
    """One entry of the report's `speed`: medians over `repeats` runs of the tool.

    Each run loads the engine anew.

    Args:
        engine: What to measure.
        checkpoint_dir: The unified checkpoint that it was made from, for the model's config.
        workload: The load.
        place: Where the tool runs.
        settings: How to measure.
        repeats: Runs of the tool.
        log_path: Gets its output.

    Raises:
        RecipeError: The workload does not fit the engine.
        ToolError: The tool failed.
        PipelineError: It reported another run than was asked for.
    """
    _require_fit(engine, workload)
    with tempfile.TemporaryDirectory(prefix="enginesmith-bench-") as name:
        folder = Path(name)
        input_dir, output_dir = folder / "input", folder / "output"
        input_dir.mkdir()
        output_dir.mkdir()
        write_model_dir(input_dir / "model", checkpoint_dir=checkpoint_dir, engine_dir=engine.dir)
        write_dataset(
            input_dir / "dataset.jsonl",
            workload,
            vocab_size=UnifiedCheckpoint(checkpoint_dir).spec.vocab_size,
            seed=settings.seed,
            rounds=settings.rounds,
        )
        window = attention_window(engine)
        if window is not None:
            _write_options(input_dir / "options.yaml", window, settings)
        given = Shared(name="input", source=input_dir)
        made = Shared(name="output", source=output_dir, read_only=False)
        built = Shared(name="engine", source=engine.dir)
        command = bench_command(
            workload,
            BenchPaths(
                model_dir=f"{place.path(given)}/model",
                engine_dir=place.path(built),
                dataset=f"{place.path(given)}/dataset.jsonl",
                report=f"{place.path(made)}/report.json",
                workspace=f"{place.path(made)}/workspace",
                options=None if window is None else f"{place.path(given)}/options.yaml",
            ),
            rounds=settings.rounds,
            warmup=settings.warmup,
            kv_cache_fraction=settings.kv_cache_fraction,
        )
        samples: list[SpeedSample] = []
        spread: dict[str, Any] = {}
        for _ in range(repeats):
            (output_dir / "report.json").unlink(missing_ok=True)
            place.run(
                command,
                [given, made, built],
                stage="bench",
                log_path=log_path,
                timeout_s=settings.timeout_s,
            )
            document = _read(output_dir / "report.json", log_path)
            samples.append(read_report(document, workload, rounds=settings.rounds))
            spread = percentiles(document)
    return {
        **summarize(workload, {"engine": samples}),
        "tool": f"{BENCH_PROGRAM} {VERSION} {mode_of(workload)}",
        "requests": workload.batch * settings.rounds,
        "percentiles": spread,
    }


def attention_window(engine: Engine) -> int | None:
    """The sliding window that the runtime must be told; None where the context stays inside it.

    TensorRT-LLM's engines do not hold it (pipeline.formats.trtllm.convert.stage).
    """
    window: int | None = engine.checks.get("conversion", {}).get("attention_window")
    return window if window is not None and engine.limits.max_seq_len > window else None


def _require_fit(engine: Engine, workload: Workload) -> None:
    limits = engine.limits
    faults = []
    if workload.isl + workload.osl > limits.max_seq_len:
        faults.append(
            f"isl + osl ({workload.isl + workload.osl}) exceeds the engine's max_seq_len "
            f"({limits.max_seq_len})"
        )
    if workload.batch > limits.max_batch_size:
        faults.append(
            f"batch ({workload.batch}) exceeds the engine's max_batch_size "
            f"({limits.max_batch_size})"
        )
    if workload.osl < 2:
        faults.append("osl must be 2 or more: trtllm-bench divides by the time after the first")
    if faults:
        raise RecipeError([Fault(f"workload {workload.name}", fault) for fault in faults])


def _write_options(path: Path, window: int, settings: BenchSettings) -> None:
    """JSON, which is YAML. The section replaces the tool's own, so it repeats what that sets."""
    cache = {
        "free_gpu_memory_fraction": settings.kv_cache_fraction,
        "enable_block_reuse": False,
        "max_attention_window": [window],
    }
    path.write_text(json.dumps({"kv_cache_config": cache}) + "\n")


def _read(path: Path, log_path: Path) -> dict[str, Any]:
    """A report; after Ctrl-C the tool ends well without one."""
    try:
        document: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise PipelineError(
            f"trtllm-bench ended well, but wrote no readable report ({error}); see {log_path}"
        ) from error
    return document
