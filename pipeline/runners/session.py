"""What acceptance and `generate` ask of a runtime, whatever it executes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from pipeline.stages import Engine

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.acceptance.workload import Workload


Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One timed greedy batch, end-of-sequence ignored.

    Attributes:
        tokens: New tokens [batch, osl].
        ttft_s: Seconds to the first token of the batch: the prefill.
        total_s: Seconds to the last token.
    """

    tokens: NDArray[np.int64]
    ttft_s: float
    total_s: float


class Session(Protocol):
    """A loaded model."""

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits of every position of one sequence [tokens, vocab]."""
        ...

    def generate(self, prompts: Sequence[Sequence[int]], osl: int) -> Generation:
        """Generate exactly `osl` tokens for each prompt, greedily, and time it."""
        ...

    def stream(
        self, prompt: Sequence[int], max_new_tokens: int, eos_token_ids: frozenset[int]
    ) -> Iterator[int]:
        """Yield tokens until an end-of-sequence id, which is not yielded."""
        ...


@runtime_checkable
class Runner(Protocol):
    """Executes an engine, or its twin, on this machine."""

    @property
    def name(self) -> str:
        """Name of the runtime, for the report."""
        ...

    @property
    def device(self) -> Device:
        """Where it executes; on `cuda` in a process of its own, whose memory ends with it."""
        ...

    def why_not(self, engine: Engine) -> str | None:
        """Why it cannot run this engine here; None when it can."""
        ...

    def open(self, engine: Engine) -> AbstractContextManager[Session]:
        """Load the engine; leaving the context frees it."""
        ...


@runtime_checkable
class SourceRunner(Protocol):
    """A runner that also executes the source model, where that is too much for the CPU."""

    def open_source(self, weights_dir: Path, context: int) -> AbstractContextManager[Session]:
        """Load the source in bfloat16; `context`: longest request, tokens."""
        ...


@runtime_checkable
class BenchRunner(Protocol):
    """A runner whose speed is measured by a tool of its runtime, which loads the engine anew."""

    def bench(
        self,
        engine: Engine,
        checkpoint_dir: Path,
        workload: Workload,
        *,
        repeats: int,
        seed: int,
        log_path: Path,
    ) -> dict[str, Any]:
        """One entry of the report's `speed`."""
        ...
