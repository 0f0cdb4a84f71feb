"""Compiles an ONNX graph with TensorRT-RTX; runs in a process of its own.

    python -m pipeline.formats.trtrtx.child JOB.json

TensorRT-RTX prints internal errors to stderr past its logger, and a crash of the library must not
take the pipeline along: so the caller keeps this process's output and reads its exit code.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.formats.trtrtx.network_check.interface import DecoderInterface


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One optimization profile: (min, opt, max) of each dynamic dimension."""

    batch: tuple[int, int, int]
    sequence: tuple[int, int, int]
    logits: tuple[int, int, int]

    def shapes(self, name: str, dims: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Minimum, optimum and maximum shape of one input; `dims` holds its static sizes."""
        per_case = zip(self.batch, self.sequence, self.logits, strict=True)
        if name == "input_ids":
            return [(batch, sequence) for batch, sequence, _ in per_case]
        if name == "write_indices":
            return [(batch,) for batch, _, _ in per_case]
        if name == "logits_index":
            return [(batch, logits) for batch, _, logits in per_case]
        return [(batch, *dims[1:]) for batch, _, _ in per_case]


@dataclass(frozen=True, kw_only=True)
class CompileJob:
    """What to compile.

    Attributes:
        graph: ONNX file, weights beside it.
        interface: What the graph takes and gives; the guard demands it of the parsed network.
        plan: Where the engine is written.
        sm: Compute capability; the engine runs on this one only.
        profiles: In the order in which a runtime selects them.
    """

    graph: str
    interface: DecoderInterface
    plan: str
    sm: int
    profiles: tuple[Profile, ...]

    def write(self, path: Path) -> None:
        """Write the job file."""
        path.write_text(json.dumps(dataclasses.asdict(self)))

    @staticmethod
    def read(path: Path) -> CompileJob:
        """Read a job file."""
        fields = json.loads(path.read_text())
        profiles = tuple(
            Profile(**{name: tuple(sizes) for name, sizes in profile.items()})
            for profile in fields.pop("profiles")
        )
        interface = DecoderInterface(**fields.pop("interface"))
        return CompileJob(profiles=profiles, interface=interface, **fields)


def compile_graph(job: CompileJob) -> None:
    """Parse, guard, compile, write the plan.

    Raises:
        CheckError: The parsed network is not the graph that was written.
        RuntimeError: The parser or the compiler refused; what it said is on stderr.
        OSError: The plan cannot be written.
    """
    import tensorrt_rtx as trt

    from pipeline.formats.trtrtx.network_check.guard import guard_network

    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(job.graph):
        errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise RuntimeError(f"TensorRT-RTX cannot parse {job.graph}: {errors}")
    guard_network(network, job.interface)
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{job.sm}"), 0)
    # The names of layers and their types stay readable in the plan: that is how FP8 is proven.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for profile in job.profiles:
        config.add_optimization_profile(_optimization_profile(builder, network, profile))
    # Piece by piece into the file: a plan built in memory is one more copy of the weights, and with
    # it a 7B model does not fit a machine with 24 GB (docs/benchmarks.md).
    with Path(job.plan).open("wb") as stream:
        writer = _writer(stream)
        built = builder.build_serialized_network_to_stream(network, config, writer)
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


def _optimization_profile(builder: Any, network: Any, profile: Profile) -> Any:
    shapes = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shapes.set_shape(tensor.name, *profile.shapes(tensor.name, tuple(tensor.shape)))
    return shapes


if __name__ == "__main__":
    compile_graph(CompileJob.read(Path(sys.argv[1])))
