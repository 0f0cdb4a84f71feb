"""Executes TensorRT-LLM engines on the card that they are for. Not run: no such machine at hand.

Speed is that of `trtllm-bench` 1.2.1. Sources, all NVIDIA/TensorRT-LLM:
`bench/benchmark/throughput.py` (56851033), `low_latency.py` (89fd9b74), `commands/bench.py`
(8b13f594), `bench/utils/data.py` (a6ad8019), and of the report `bench/dataclasses/reporting.py`
(2787769c) and `statistics.py` (77d7fe1e). The options are listed in
`tests/runners/trtllm_bench_options.json`. It measures in the client, around the LLM class, so
Python's share of the time counts.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Le
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from pipeline.core.errors import Fault, PipelineError, RecipeError
from pipeline.core.gpu import find_gpu
from pipeline.core.safetensors_files import SINGLE, TensorSpec, safetensors_header
from pipeline.core.settings import STRICT, read_json_object
from pipeline.core.values import Engine
from pipeline.formats.spec import format_spec
from pipeline.formats.trtllm.place import Shared, ToolHost, Where, choose_place
from pipeline.formats.trtllm.spec import BENCH_PROGRAM, NAME, VERSION
from pipeline.quant.unified import UnifiedCheckpoint, copy_companions
from pipeline.runners.child import CHILDREN, ChildSession, Program, open_child
from pipeline.runners.runner import Ability, BenchResult, Device
from pipeline.runners.workload import Workload

_FIGURES = {
    "output_tokens_per_s": "performance.system_output_throughput_tok_s",
    "ttft_ms": "streaming_metrics.avg_ttft_ms",
    "itl_ms": "streaming_metrics.avg_tpot_ms",
}
_SPREADS = {
    "ttft_ms": "streaming_metrics.ttft_percentiles",
    "itl_ms": "streaming_metrics.tpot_percentiles",
    "request_latency_ms": "performance.request_latency_percentiles_ms",
}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrtLlmRunner:
    """Runs an engine in TensorRT-LLM, on this machine or in the build image.

    Attributes:
        where: As of the compiler.
        image: The build image.
        kv_cache_fraction: Share of the memory left after loading that the KV cache gets.
        bench_rounds: Batches that one run of `trtllm-bench` measures, one after the other.
        bench_warmup: Requests before them.
        timeout_s: After so long a run of `trtllm-bench`, a load or an answer is stopped.
    """

    name: ClassVar[str] = "trtllm"
    device: ClassVar[Device] = "cuda"
    abilities: ClassVar[frozenset[Ability]] = frozenset()
    """`trtllm-bench` has no option for arrivals, one end-of-sequence id at most, and sets output
    tokens on an object that requests which wait share."""

    where: Where
    image: str
    kv_cache_fraction: Annotated[PositiveFloat, Le(1.0)]
    bench_rounds: PositiveInt
    bench_warmup: NonNegativeInt
    timeout_s: PositiveFloat

    def why_not(self, engine: Engine) -> str | None:
        if format_spec(engine.format).runner != self.name:
            return f"runner=trtllm does not run {engine.format} engines"
        if engine.runtime != (NAME, VERSION):
            return (
                f"the engine is for {' '.join(engine.runtime)}, this runner is {NAME} {VERSION}: "
                "an engine runs only in the release that built it"
            )
        try:
            self._place(engine.sms[0])
        except PipelineError as error:
            return f"runner=trtllm cannot run here: {error}"
        return None

    def open(self, engine: Engine) -> AbstractContextManager[ChildSession]:
        place = self._place(engine.sms[0])
        built = json.loads((engine.dir / "config.json").read_text())["build_config"]
        folder = Shared(name="engine", source=engine.dir)
        children = Shared(name="children", source=CHILDREN)
        chunked = built["plugin_config"]["use_paged_context_fmha"]
        command = (place.python, "-P", f"{place.path(children)}/main.py")
        program = Program(
            name="TensorRT-LLM",
            model=f"{place.path(children)}/trtllm_model.py",
            arguments={
                "engine_dir": place.path(folder),
                "context": built["max_seq_len"],
                "kv_cache_fraction": self.kv_cache_fraction,
                "attention_window": attention_window(engine),
                "chunked_prefill": bool(chunked and built["max_num_tokens"] < built["max_seq_len"]),
            },
            load_s=self.timeout_s,
            answer_s=self.timeout_s,
            start=lambda: place.started(command, (children, folder), stage="runner"),
        )
        return open_child(program)

    def bench(
        self,
        engine: Engine,
        workload: Workload,
        *,
        checkpoint_dir: Path,
        repeats: int,
        seed: int,
        log_path: Path,
    ) -> BenchResult:
        """Run `trtllm-bench` `repeats` times; each run loads the engine anew.

        Raises:
            RecipeError: The workload asks for one token only.
            ToolError: The tool failed.
            PipelineError: It reported another run than was asked for, or none.
        """
        if workload.osl < 2:
            fault = "osl must be 2 or more: trtllm-bench divides by the time after the first token"
            raise RecipeError([Fault(f"workload {workload.name}", fault)])
        place, documents = self._place(engine.sms[0]), []
        checkpoint = UnifiedCheckpoint(checkpoint_dir)
        quant_algo = checkpoint.precision.quant_algo
        with tempfile.TemporaryDirectory(prefix="enginesmith-bench-") as name:
            given = Shared(name="input", source=Path(name) / "input")
            made = Shared(name="output", source=Path(name) / "output", read_only=False)
            built = Shared(name="engine", source=engine.dir)
            given.source.mkdir()
            made.source.mkdir()
            write_model_dir(given.source / "model", checkpoint_dir, engine.dir)
            dataset = given.source / "dataset.jsonl"
            self.write_dataset(dataset, workload, checkpoint.spec.vocab_size, seed)
            if window := attention_window(engine):
                # The section replaces the tool's own, so it repeats what that sets. JSON is YAML.
                options = {"enable_block_reuse": False, "max_attention_window": [window]}
                options["free_gpu_memory_fraction"] = self.kv_cache_fraction
                text = json.dumps({"kv_cache_config": options})
                (given.source / "options.yaml").write_text(text)
            folders = (place.path(one) for one in (given, made, built))
            command = self.bench_command(workload, *folders, options=window is not None)
            report, limit_s = made.source / "report.json", self.timeout_s
            where: dict[str, Any] = {"stage": "bench", "log_path": log_path}
            for _ in range(repeats):
                report.unlink(missing_ok=True)
                place.run(command, (given, made, built), timeout_s=limit_s, **where)
                if not report.exists():  # after Ctrl-C the tool ends well without one
                    message = f"trtllm-bench ended well, but wrote no report; see {log_path}"
                    raise PipelineError(message)
                documents.append(read_json_object(report))
        return BenchResult(
            runs=tuple(self.read_report(one, workload, quant_algo) for one in documents),
            tool=f"{BENCH_PROGRAM} {VERSION} {mode_of(workload)}",
            requests=workload.batch * self.bench_rounds,
            percentiles=percentiles(documents[-1]),
        )

    def write_dataset(self, path: Path, workload: Workload, vocab_size: int, seed: int) -> None:
        """One JSON line for each request; every round has prompts of its own, so none is cached."""
        with path.open("w", encoding="ascii") as stream:
            for number in range(self.bench_rounds):
                prompts = workload.request_prompts(vocab_size, seed + number)
                for task, prompt in enumerate(prompts, number * workload.batch):
                    request = {"task_id": task, "input_ids": prompt, "output_tokens": workload.osl}
                    stream.write(json.dumps(request) + "\n")

    def bench_command(
        self, workload: Workload, given: str, made: str, engine_dir: str, *, options: bool
    ) -> tuple[str, ...]:
        """Program and arguments; the folders are as the tool sees them.

        `throughput` streams, for times to tokens; `latency` always does. End-of-sequence is off in
        both, and `--max_seq_len` must not be given for an engine.
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
            *("--num_requests", str(workload.batch * self.bench_rounds)),
            *("--concurrency", str(workload.batch)),
            *("--warmup", str(self.bench_warmup)),
            *("--kv_cache_free_gpu_mem_fraction", str(self.kv_cache_fraction)),
            *("--report_json", f"{made}/report.json"),
        ]
        if mode == "throughput":
            command += ["--eos_id", "-1", "--streaming"]
        if options:
            command += ["--extra_llm_api_options", f"{given}/options.yaml"]
        return tuple(command)

    def read_report(
        self, document: Mapping[str, Any], workload: Workload, quant_algo: str | None
    ) -> dict[str, float]:
        """The figures of one run.

        - `output_tokens_per_s`: of all requests, from the first start to the last end.
        - `ttft_ms`: mean over requests, from submission to the first token.
        - `itl_ms`: mean over requests of (end - first token) / (osl - 1).

        Raises:
            PipelineError: Another run than asked for, or a figure that is none; lists all of it.
        """
        wanted: dict[str, Any] = {
            "engine.backend": "TRT",
            "engine.version": VERSION,
            "engine.quantization": quant_algo,
            "world_info.world_size": 1,
            "request_info.num_requests": workload.batch * self.bench_rounds,
            "request_info.avg_input_length": workload.isl,
            "request_info.avg_output_length": workload.osl,
        }
        faults = [
            f"  {path} is {_at(document, path)!r}, wanted {value!r}"
            for path, value in wanted.items()
            if _at(document, path) != value
        ]
        batch = _at(document, "world_info.max_batch_size")
        if not isinstance(batch, int) or batch < workload.batch:
            wanted_batch = f"wanted {workload.batch} or more"
            faults.append(f"  world_info.max_batch_size is {batch!r}, {wanted_batch}")
        figures = {name: _at(document, path) for name, path in _FIGURES.items()}
        faults += [
            f"  {_FIGURES[name]} is {value!r}, wanted a positive number"
            for name, value in figures.items()
            if not isinstance(value, int | float) or not 0 < value < math.inf
        ]
        if faults:
            lines = "\n".join(faults)
            raise PipelineError(
                f"trtllm-bench reported another run than workload {workload.name}:\n{lines}\n"
                "nothing of it is used; see its log"
            )
        return {name: float(value) for name, value in figures.items()}

    def _place(self, sm: int) -> ToolHost:
        return choose_place(
            self.where, image=self.image, card=lambda: find_gpu(sm), section="runner"
        )


def attention_window(engine: Engine) -> int | None:
    """The sliding window that the runtime needs; None where the context stays inside it.

    TensorRT-LLM's engines do not hold it (pipeline.formats.trtllm).
    """
    window: int | None = engine.checks.get("conversion", {}).get("attention_window")
    return window if window is not None and engine.limits.max_seq_len > window else None


def mode_of(workload: Workload) -> Literal["throughput", "latency"]:
    """`latency` for one request at a time: it sets the runtime up for that; else `throughput`."""
    return "latency" if workload.batch == 1 else "throughput"


def write_model_dir(folder: Path, checkpoint_dir: Path, engine_dir: Path) -> None:
    """Fill the folder for `--model_path`: a Hugging Face config, a tokenizer, and one tensor.

    `trtllm-bench` reads headers of safetensors for its PyTorch backend only (`ModelConfig.from_hf`
    in bench/build/dataclasses.py). `auto_map` would make it look for the model's Python files.
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
    (folder / SINGLE).write_bytes(safetensors_header([unused]) + bytes(unused.size_bytes))


def percentiles(document: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Spread over requests, milliseconds, for the report; empty where there is none."""
    found = {}
    for name, path in _SPREADS.items():
        values = _at(document, path)
        if isinstance(values, Mapping):
            wanted = [key for key in ("p50", "p90", "p99") if key in values]
            found[name] = {key: round(float(values[key]), 3) for key in wanted}
    return found


def _at(document: Mapping[str, Any], path: str) -> Any:
    node: Any = document
    for part in path.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


KIND = TrtLlmRunner
