"""What TensorRT-RTX does, each in a process of its own: checking a network, and compiling it.

    python -m pipeline.formats.trtrtx.child JOB.json

TensorRT-RTX prints internal errors to stderr past its logger, and a crash of the library must not
take the pipeline along: so the caller keeps this process's output and reads its exit code.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import TypeAdapter

from pipeline.core.errors import PipelineError
from pipeline.core.process import run_tool
from pipeline.formats.trtrtx.network_check.guard import DecoderInterface, guard_network
from pipeline.formats.trtrtx.network_check.network import parse_network


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


@dataclass(frozen=True, kw_only=True)
class CompileJob:
    """What to compile.

    Attributes:
        graph: ONNX file, weights beside it.
        interface: What the graph takes and gives; the guard requires it of the parsed network.
        plan: Where the engine is written.
        sm: Compute capability; the engine runs on this one only.
        profiles: In the order in which a runtime selects them.
    """

    graph: Path
    interface: DecoderInterface
    plan: Path
    sm: int
    profiles: tuple[Profile, ...]

    def run(self) -> None:
        """Parse, guard, compile, write the plan.

        Raises:
            CheckError: The parsed network is not the graph that was written.
            RuntimeError: The compiler refused; its messages are on stderr.
            OSError: The plan cannot be written.
        """
        import tensorrt_rtx as trt

        parsed = parse_network(self.graph)
        guard_network(parsed.network, self.interface)
        config = parsed.builder.create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{self.sm}"), 0)
        # The names of layers and their types stay readable in the plan: the proof reads them.
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        for profile in self.profiles:
            shapes = parsed.builder.create_optimization_profile()
            for index in range(parsed.network.num_inputs):
                tensor = parsed.network.get_input(index)
                shapes.set_shape(tensor.name, *profile.shapes(tensor.name, tuple(tensor.shape)))
            config.add_optimization_profile(shapes)
        # Piece by piece into the file: a plan built in memory is one more copy of the weights, and
        # with it a 7B model does not fit a machine with 24 GB (docs/benchmarks.md).
        with self.plan.open("wb") as stream:
            writer = _writer(stream)
            built = parsed.builder.build_serialized_network_to_stream(
                parsed.network, config, writer
            )
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


@dataclass(frozen=True, kw_only=True)
class CheckJob:
    """What to check: `network_check.compare.check_network`'s arguments, and where to write."""

    graph: Path
    reference: Path
    interface: DecoderInterface
    result: Path

    def run(self) -> None:
        """Check; the result appears only when the network passed.

        Raises:
            CheckError: It did not.
        """
        from pipeline.formats.trtrtx.network_check.compare import check_network

        found = check_network(self.graph, self.reference, interface=self.interface)
        self.result.write_text(json.dumps(asdict(found), indent=1) + "\n")


_JOB: TypeAdapter[CompileJob | CheckJob] = TypeAdapter(CompileJob | CheckJob)


def run_child(job: CompileJob | CheckJob, folder: Path, *, stage: str, log_path: Path) -> None:
    """Run a job in a child process; its file is in `folder` meanwhile.

    Raises:
        ToolError: It failed; the message has the last lines of the log.
    """
    job_file = folder / "job.json"
    job_file.write_bytes(_JOB.dump_json(job))
    command = [sys.executable, "-m", "pipeline.formats.trtrtx.child", str(job_file)]
    run_tool(command, stage=stage, log_path=log_path)
    job_file.unlink()


def main(job_file: Path) -> int:
    """Run one job; returns the exit code, with the reason on stderr."""
    try:
        _JOB.validate_json(job_file.read_bytes()).run()
    except PipelineError as error:
        sys.stderr.write(f"{error}\n")
        return int(error.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
