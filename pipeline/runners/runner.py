"""What a runner is, what it executes, and the loaded model it opens: token ids in and out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from pipeline.core.errors import Fault, PipelineError, RecipeError
from pipeline.core.values import Engine
from pipeline.runners.workload import BatchOptions, Workload

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

UNUSED_TOKEN = -1
"""What stands in `Generation.tokens` behind the end of an answer."""


@dataclass(frozen=True, kw_only=True)
class RequestTiming:
    """The times of one request from its arrival, so with its waiting, where the runtime keeps them.

    `itl_ms`: (request_latency_ms - ttft_ms) / (tokens - 1), TPOT in vLLM's benchmark; None if it
    has one token. `arrival_s`: after the first request; None where all started together.
    """

    ttft_ms: float
    request_latency_ms: float
    itl_ms: float | None
    arrival_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One timed greedy batch.

    `tokens` are new ones [batch, longest answer]; `UNUSED_TOKEN` behind the end of a shorter one.
    """

    tokens: NDArray[np.int64]
    ttft_s: float  # until every request has its first token; of a static batch the prefill
    total_s: float  # to the last token
    lengths: tuple[int, ...] | None = None  # of each; None where all are as long as the array
    requests: tuple[RequestTiming, ...] = ()  # in the order of the prompts; empty where not known

    @property
    def output_lengths(self) -> tuple[int, ...]:
        return self.lengths or (int(self.tokens.shape[-1]),) * len(self.tokens)

    @property
    def output_tokens(self) -> int:
        return sum(self.output_lengths)


class Session(Protocol):
    """A loaded model; greedy."""

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Finite logits, or log-probabilities, of every position of a sequence [tokens, vocab]."""

    def generate(
        self, prompts: Sequence[Sequence[int]], osl: int, options: BatchOptions | None = None
    ) -> Generation:
        """Generate a batch, and time it; `osl` are the output tokens of the longest request.

        `options` None: so many of each, end-of-sequence ignored, all at once. RecipeError if a
        prompt and its answer do not fit the context together.
        """

    def stream(
        self, prompt: Sequence[int], max_new_tokens: int, eos_token_ids: frozenset[int]
    ) -> Iterator[int]:
        """Yield tokens until an end-of-sequence id, which is not yielded, or a full context.

        RecipeError if the prompt leaves no room for an answer.
        """


def require_fit(prompts: Sequence[Sequence[int]], new_tokens: int, context: int | None) -> None:
    """Refuse prompts that are empty or leave no room for `new_tokens` more each.

    `context` is the most tokens of one request, prompt and answer together; None if not known.
    """
    lengths = [len(prompt) for prompt in prompts]
    message = ""
    if not lengths or min(lengths) < 1:
        message = f"got {len(lengths)} prompts, wanted one or more of 1 token or more"
    elif context is not None and max(lengths) + new_tokens > context:
        answer = "an answer" if new_tokens == 1 else f"{new_tokens} output tokens"
        message = (
            f"a prompt of {max(lengths)} tokens leaves no room for {answer}: the engine holds "
            f"{context} tokens of a request, prompt and answer together; shorten the prompt to "
            f"{max(context - new_tokens, 0)} tokens, or build with a larger compiler.max_seq_len"
        )
    if message:
        raise RecipeError([Fault("", message)])


def require_possible(
    generation: Generation,
    prompts: Sequence[Sequence[int]],
    osl: int,
    options: BatchOptions | None = None,
) -> None:
    """Refuse other answers than were asked for, and times that no run can have taken."""
    each = (osl,) * len(prompts) if options is None else options.osl_each
    ends = frozenset[int]() if options is None else options.eos_token_ids
    lengths = generation.output_lengths
    if len(lengths) != len(prompts):
        raise _other_tokens(f"{len(prompts)} answers", f"{len(lengths)}")
    for place, (length, most) in enumerate(zip(lengths, each, strict=True)):
        ended = 0 < length < most and int(generation.tokens[place, length - 1]) in ends
        if length != most and not ended:
            raise _other_tokens(f"{most} tokens of request {place}", f"{length}")
    times = [generation.ttft_s, generation.total_s]
    times += [value or 0.0 for one in generation.requests for value in asdict(one).values()]
    # A request's times are of other clocks than those of the whole call.
    ordered = bool(generation.requests) or generation.ttft_s <= generation.total_s
    possible = all(math.isfinite(value) and value >= 0 for value in times)
    if not possible or not ordered or not generation.total_s > 0:
        raise PipelineError(
            f"the runner reports {generation.ttft_s} s to the first and {generation.total_s} s to "
            f"the last of {generation.output_tokens} tokens, or a request's time that is negative "
            "or not a number: no run takes such a time; measure again, and report it if it stays so"
        )


def _other_tokens(wanted: str, got: str) -> PipelineError:
    return PipelineError(
        f"asked the runner for {wanted}, got {got}; its speed cannot be measured: see that it "
        "ignores end-of-sequence where it should, and that its limits hold the workload"
    )


Device = Literal["cpu", "cuda"]
Ability = Literal[
    "requests",
    "isl_distribution",
    "prompts_file",
    "osl_distribution",
    "ignore_eos",
    "request_rate",
]
"""Keys of a workload or a sustained run that ask for more than one batch of equal requests."""
BATCHES: frozenset[Ability] = frozenset(
    {"requests", "isl_distribution", "prompts_file", "osl_distribution", "ignore_eos"}
)
"""All that static batches can execute: of ragged prompts, until the last row has ended."""

WHO_CAN: dict[str, str] = {
    **dict.fromkeys(BATCHES, "runner=vllm and tensorrt_rtx do"),
    "request_rate": "runner=vllm does",
}
"""Which runners execute an ability, for messages."""


@runtime_checkable
class Runner(Protocol):
    """Executes an engine, or its CPU graph, on this machine."""

    @property
    def name(self) -> str:
        """Of the runtime, for the report."""

    @property
    def device(self) -> Device:
        """Where it executes; on `cuda` in a process of its own, whose memory ends with it."""

    @property
    def abilities(self) -> frozenset[Ability]:
        """What it executes of workloads; none on a CPU, where a build times nothing."""

    def why_not(self, engine: Engine) -> str | None:
        """Why it cannot run this engine here; None when it can."""

    def open(self, engine: Engine) -> AbstractContextManager[Session]:
        """Load an engine that `why_not` has nothing against; leaving the context frees it."""


@runtime_checkable
class SourceRunner(Protocol):
    """A runner that also executes the source model, where that is too much for the CPU."""

    def open_source(self, weights_dir: Path, context: int) -> AbstractContextManager[Session]: ...


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
