"""TensorRT-RTX: compiles the decoder graph ahead of time for one SM, with no GPU.

    python -m pipeline.formats.trtrtx.compiler compile|check JSON

Three proofs stand in for a GPU: the guard and the network check (the compiler was handed the graph
that we wrote), and the plan's own text (FP8 asked is FP8 delivered).

Check and compilation each run in a process of their own: TensorRT-RTX prints internal errors to
stderr past its logger, and a crash of the library must not take the pipeline along.
"""

from __future__ import annotations

import json
import mmap
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal

from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from pipeline.core.cache import Stage, StageCache
from pipeline.core.errors import Fault, IncompatibleError, PipelineError, RecipeError
from pipeline.core.hardware import Target
from pipeline.core.process import run_tool
from pipeline.core.settings import STRICT
from pipeline.core.values import Checkpoint, Engine, Format, Limits
from pipeline.formats.trtrtx.graph_writer import node_names
from pipeline.formats.trtrtx.network import guard_network, parse_network
from pipeline.formats.trtrtx.onnx_graph import (
    CPU_CUT,
    GRAPH_CODE,
    RTX_CUT,
    RTX_GRAPH,
    GraphSettings,
    buildable_attention,
    convert,
    cut_context,
    cut_layers,
    quantized_linears,
)
from pipeline.formats.trtrtx.plan_text import prove_plan
from pipeline.formats.trtrtx.spec import PACKAGE, PLAN_FILE, SPEC
from pipeline.model.spec import Attention
from pipeline.quant.spec import quant_spec
from pipeline.quant.unified import UnifiedCheckpoint, copy_companions

STAGE = Stage(
    name="compile-trtrtx",
    version=1,
    code=("pipeline.formats.trtrtx.compiler", "pipeline.formats.trtrtx.plan_text", *GRAPH_CODE),
)
CHECK_STAGE = Stage(
    name="network-check",
    version=1,
    code=(
        "pipeline.formats.trtrtx.network",
        "pipeline.formats.trtrtx.interpreter",
        "pipeline.formats.trtrtx.network_check",
        "pipeline.formats.trtrtx.compiler",
        *GRAPH_CODE,
    ),
)
_CHECK_RESULT = "result.json"


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One optimization profile: (min, opt, max) of each dynamic dimension."""

    batch: tuple[int, int, int]
    sequence: tuple[int, int, int]
    logits: tuple[int, int, int]

    def shapes(self, name: str, dims: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Minimum, optimum and maximum shape of one input; `dims` holds its static sizes."""
        second = {"input_ids": self.sequence, "logits_index": self.logits}.get(name)
        if second is not None:
            return list(zip(self.batch, second, strict=True))
        return [(batch, *dims[1:]) for batch in self.batch]


def compile_graph(graph: Path, plan: Path, sm: int, profiles: Sequence[Profile]) -> None:
    """Parse an ONNX file, guard, compile for one SM, write the plan."""
    import tensorrt_rtx as trt

    parsed = parse_network(graph)
    guard_network(parsed.network, graph)
    config = parsed.builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), 0)
    # The names of layers and their types stay readable in the plan: the proof reads them.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for profile in profiles:
        shapes = parsed.builder.create_optimization_profile()
        for index in range(parsed.network.num_inputs):
            tensor = parsed.network.get_input(index)
            shapes.set_shape(tensor.name, *profile.shapes(tensor.name, tuple(tensor.shape)))
        config.add_optimization_profile(shapes)
    # Piece by piece into the file: a plan built in memory is one more copy of the weights, and
    # with it a 7B model does not fit a machine with 24 GB (docs/benchmarks.md).
    with plan.open("wb") as stream:
        writer = _writer(stream)
        build = parsed.builder.build_serialized_network_to_stream
        built = build(parsed.network, config, writer)
    if writer.fault is not None:
        raise writer.fault
    if not built:
        raise RuntimeError("TensorRT-RTX built no engine; its messages are above")


def _writer(stream: BinaryIO) -> Any:
    """What the compiler hands the pieces of the plan to; `fault` is the first that failed."""
    import tensorrt_rtx as trt

    class PlanWriter(trt.IStreamWriter):  # type: ignore[misc]  # the library has no types
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.fault: OSError | None = None

        def write(self, piece: Any) -> int:
            # The library prints what is raised here and reports success (1.7.1, disk full).
            if self.fault is None:
                try:
                    return stream.write(piece)
                except OSError as error:
                    self.fault = error
            return 0

    return PlanWriter()


def run_child(job: str, arguments: Mapping[str, Any], *, stage: str, log_path: Path) -> None:
    """Run a job of `main` in a child process."""
    command = [sys.executable, "-m", "pipeline.formats.trtrtx.compiler", job]
    text = json.dumps(arguments, default=str)
    run_tool([*command, text], stage=stage, log_path=log_path)


def main(job: str, text: str) -> int:
    """Compile, or check and write what was found; the exit code, with the reason on stderr."""
    arguments: dict[str, Any] = json.loads(text)
    paths = [Path(path) for path in arguments["paths"]]
    try:
        if job == "compile":
            (graph, plan), profiles = paths, [Profile(**one) for one in arguments["profiles"]]
            compile_graph(graph, plan, arguments["sm"], profiles)
        else:
            from pipeline.formats.trtrtx.network_check import check_network

            *graphs, result = paths
            result.write_text(json.dumps(check_network(*graphs), indent=1) + "\n")
    except PipelineError as error:
        sys.stderr.write(f"{error}\n")
        return int(error.exit_code)
    return 0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrtRtxCompiler:
    """Compiler for one SM with two profiles: decode (one token per row) and prefill.

    Attributes:
        max_batch_size: Rows of the static KV cache, which bound the two batches below.
        opt_batch_size: Decode batch that kernels are chosen for.
        max_prefill_batch_size: Rows of one prefill step.
        max_seq_len: Static cache length: prompt + output tokens of one request.
        activation_dtype: 16-bit type of activations and of what is not quantized.
        kv_cache_dtype: TensorRT-RTX updates the static cache in the activations' type.
    """

    format: ClassVar[Format] = SPEC.name

    max_batch_size: PositiveInt
    opt_batch_size: PositiveInt
    max_prefill_batch_size: PositiveInt
    max_seq_len: PositiveInt
    activation_dtype: Literal["bfloat16", "float16"]
    kv_cache_dtype: Literal["bfloat16", "float16", "fp8"]

    def __post_init__(self) -> None:
        if self.kv_cache_dtype != self.activation_dtype:
            wrong = f"kv_cache_dtype ({self.kv_cache_dtype}) must be activation_dtype"
            advice = "for an FP8 cache use compiler=trtllm or compiler=checkpoint"
            raise ValueError(f"{wrong} ({self.activation_dtype}) in TensorRT-RTX; {advice}")

    @property
    def limits(self) -> Limits:
        return Limits(
            max_batch_size=self.max_batch_size,
            max_seq_len=self.max_seq_len,
            max_num_tokens=max(self.max_batch_size, self._prefill_batch * self.max_seq_len),
            kv_cache_dtype=self.kv_cache_dtype,
        )

    @property
    def pinned_runtime(self) -> tuple[str, str]:
        try:
            return SPEC.runtime, compiler_version()
        except IncompatibleError:  # a plan needs no compiler
            return SPEC.runtime, ""

    @property
    def _prefill_batch(self) -> int:
        return min(self.max_prefill_batch_size, self.max_batch_size)

    @property
    def profiles(self) -> tuple[Profile, Profile]:
        """Decode first: a runtime starts with profile 0."""
        batch, one = self.max_batch_size, (1, 1, 1)
        lengths = (1, max(1, self.max_seq_len // 2), self.max_seq_len)
        decode = (1, min(self.opt_batch_size, batch), batch)
        return (
            Profile(batch=decode, sequence=one, logits=one),
            Profile(batch=(1, 1, self._prefill_batch), sequence=lengths, logits=one),
        )

    @property
    def _profiles_json(self) -> Any:
        return json.loads(json.dumps([asdict(profile) for profile in self.profiles]))

    @property
    def _graph(self) -> GraphSettings:
        return GraphSettings(context=self.max_seq_len, activation=self.activation_dtype)

    def check_machine(self, target: Target) -> None:
        """Any machine will do."""

    def inputs(self, target: Target) -> dict[str, Any]:
        return {"graph": self._graph.inputs(), **self._compile_inputs(target)}

    def _compile_inputs(self, target: Target) -> dict[str, Any]:
        return {
            **STAGE.identity,
            "sm": target.sm,
            "profiles": self._profiles_json,
            "tools": {PACKAGE: compiler_version()},
        }

    def compile(
        self, checkpoint: Checkpoint, target: Target, cache: StageCache, log_dir: Path
    ) -> Engine:
        spec = UnifiedCheckpoint(checkpoint.dir).spec
        _check_attention_shape(buildable_attention(spec))
        graphs = convert(checkpoint.dir, checkpoint.digest, self._graph, cache)
        network = self._check_network(checkpoint.dir, graphs.dir, cache, log_dir)
        made_of = {"checkpoint": checkpoint.digest, "graph": graphs.digest}
        result = cache.run(
            STAGE,
            {**made_of, **self._compile_inputs(target)},
            lambda out: self._produce(checkpoint, graphs.dir, target, out, log_dir),
        )
        return SPEC.engine(
            self,
            checkpoint,
            target,
            result.dir / "engine",
            cpu_graph_dir=graphs.dir,
            tools={**checkpoint.calibration["tools"], PACKAGE: compiler_version()},
            checks={**result.read_json("checks.json"), "network": network},
        )

    def _check_network(
        self, checkpoint_dir: Path, graphs: Path, cache: StageCache, log_dir: Path
    ) -> dict[str, Any]:
        """Check the cut of a converted model, unless one like it has passed before.

        What the parser makes of a layer does not depend on its weights: they are not in the key.
        """
        checkpoint = UnifiedCheckpoint(checkpoint_dir)
        spec, layers = checkpoint.spec, cut_layers(checkpoint)
        inputs = {
            "config": spec.to_json(),
            "context": cut_context(spec, self.max_seq_len),
            "dtype": self.activation_dtype,
            "layers": len(layers),
            "quantized_linears": sorted(quantized_linears(checkpoint, layers)),
            "precision": checkpoint.precision.name,
            "tools": {name: version(name) for name in (PACKAGE, "onnxruntime", "onnx")},
        }

        def produce(out: Path) -> None:
            paths = [graphs / RTX_CUT, graphs / CPU_CUT, out / _CHECK_RESULT]
            log_path = log_dir / "network-check.log"
            run_child("check", {"paths": paths}, stage=CHECK_STAGE.name, log_path=log_path)

        found: dict[str, Any] = cache.run(CHECK_STAGE, inputs, produce).read_json(_CHECK_RESULT)
        return found

    def _produce(
        self, checkpoint: Checkpoint, graphs: Path, target: Target, out: Path, log_dir: Path
    ) -> None:
        engine_dir = out / "engine"
        engine_dir.mkdir()
        plan = engine_dir / PLAN_FILE
        spec = UnifiedCheckpoint(checkpoint.dir).spec
        job = {
            "paths": [graphs / RTX_GRAPH, plan],
            "sm": target.sm,
            "profiles": self._profiles_json,
        }
        run_child("compile", job, stage="compile", log_path=log_dir / "compile.log")
        with plan.open("rb") as stream, mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as text:
            proof = prove_plan(
                text,
                quant_spec(checkpoint.precision),
                sm=target.sm,
                profiles=len(self.profiles),
                quantized_linears=node_names(spec, checkpoint.quantized_linears),
                kept_16bit=node_names(spec, checkpoint.kept_16bit),
            )
        shutil.copyfile(checkpoint.dir / "config.json", engine_dir / "config.json")
        copy_companions(checkpoint.dir, engine_dir)
        (out / "checks.json").write_text(json.dumps({"plan": proof}, indent=1) + "\n")


def _check_attention_shape(attention: Attention) -> None:
    """Refuse what TensorRT-RTX 1.7.1 has no attention kernel for.

    Tried for sm_89 in bfloat16, 2026-11-25: 1 to 3 heads and sizes 8 and 20 fail, 4 to 32 heads and
    sizes 16 to 256 build. No published model that we know is smaller.
    """
    if attention.heads < 4 or attention.head_dim < 16 or attention.head_dim % 8:
        got = f"TensorRT-RTX has no attention kernel for {attention.heads} heads of"
        wanted = "it wants four heads or more, of 16 elements or more in steps of eight"
        message = f"{got} {attention.head_dim}; {wanted}: use compiler=checkpoint"
        raise RecipeError([Fault("compiler", message)])


def compiler_version() -> str:
    """Of the installed TensorRT-RTX; an `IncompatibleError` where there is none."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError as error:
        message = f"compiler=trtrtx needs {PACKAGE}: pip install '.[build]'"
        raise IncompatibleError(message) from error


KIND = TrtRtxCompiler

if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
