"""What a runner is, and which workloads it executes: known from the recipe alone."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from pipeline.core.values import Engine
from pipeline.runners.session import Session
from pipeline.runners.workload import Workload

Device = Literal["cpu", "cuda"]
Ability = Literal[
    "requests",
    "isl_distribution",
    "prompts_file",
    "osl_distribution",
    "ignore_eos",
    "request_rate",
    "clear_cache",
]
"""Keys of a workload or a sustained run that ask for more than one batch of equal requests."""
BATCHES: frozenset[Ability] = frozenset(
    {"requests", "isl_distribution", "prompts_file", "osl_distribution", "ignore_eos"}
)
"""All that static batches can execute: of ragged prompts, until the last row has ended."""

WHO_CAN: dict[str, str] = {
    **dict.fromkeys(BATCHES, "runner=vllm, tensorrt_rtx and onnxruntime do"),
    "request_rate": "runner=vllm does",
    "clear_cache": "runner=transformers does",
}
"""Which runners execute an ability, for messages."""


@runtime_checkable
class Runner(Protocol):
    """Executes an engine, or its CPU graph, on this machine."""

    @property
    def name(self) -> str:
        """Of the runtime, for the report."""
        ...

    @property
    def device(self) -> Device:
        """Where it executes; on `cuda` in a process of its own, whose memory ends with it."""
        ...

    @property
    def abilities(self) -> frozenset[Ability]: ...

    def why_not(self, engine: Engine) -> str | None:
        """Why it cannot run this engine here; None when it can."""
        ...

    def open(self, engine: Engine) -> AbstractContextManager[Session]:
        """Load an engine that `why_not` has nothing against; leaving the context frees it."""
        ...


@runtime_checkable
class SourceRunner(Protocol):
    """A runner that also executes the source model, where that is too much for the CPU."""

    def open_source(self, weights_dir: Path, context: int) -> AbstractContextManager[Session]: ...


@dataclass(frozen=True, kw_only=True)
class BenchRun:
    """One run of a runtime's own tool; the figures as in `pipeline.acceptance.speed`."""

    output_tokens_per_s: float
    ttft_ms: float
    itl_ms: float


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """What a runtime's own tool (name, version and mode) measured, one run for each repeat.

    `requests` are of one run; `percentiles` (p50, p90, p99) over those of the last, milliseconds.
    """

    runs: tuple[BenchRun, ...]
    tool: str
    requests: int
    percentiles: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class BenchTask:
    """One workload for a runtime's own tool; the engine was made from `checkpoint_dir`."""

    checkpoint_dir: Path
    workload: Workload
    repeats: int
    seed: int
    log_path: Path


@runtime_checkable
class BenchRunner(Protocol):
    """A runner whose speed is measured by a tool of its runtime, which loads the engine anew."""

    def bench(self, engine: Engine, task: BenchTask) -> BenchResult: ...


def why_not_workload(runner: Runner, workload: Workload) -> tuple[str, ...]:
    """Why a runner does not execute a workload, with the next step; empty where it does."""
    return tuple(
        f"runner {runner.name} does not execute {key}{': false' if key == 'ignore_eos' else ''} "
        f"({WHO_CAN[key]}); leave it out of workload {workload.name}, or choose another runner"
        for key in workload.needs
        if key not in runner.abilities
    )


NO_CARD = (
    "NVML shows this process none; see nvidia-smi, CUDA_VISIBLE_DEVICES and that nvidia-ml-py is "
    "installed"
)


def installed_version(package: str) -> str:
    """Of a distribution, which is not imported; empty where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def torch_fault() -> str | None:
    """What is wrong with the PyTorch that is installed; None where it is built for CUDA."""
    torch = installed_version("torch")
    if torch and not torch.endswith("+cpu"):
        return None
    return (
        f"needs PyTorch built for CUDA, got {torch or 'none'}: install one as "
        "https://pytorch.org/get-started says"
    )
