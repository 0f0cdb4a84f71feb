"""What acceptance and `generate` ask of a runtime, whatever it executes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from pipeline.core.values import Engine

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

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


@dataclass(frozen=True, kw_only=True)
class Demands:
    """What a batch asks beyond its prompts and the longest answer.

    Attributes:
        osl_each: Most output tokens of each request.
        eos_token_ids: Each of them ends an answer, as its last token; empty to ignore them all.
        arrivals_s: Seconds after the start at which each request arrives; empty for all at once.
        max_concurrency: Most requests at once where they arrive; None for no bound.
    """

    osl_each: tuple[int, ...]
    eos_token_ids: frozenset[int] = frozenset()
    arrivals_s: tuple[float, ...] = ()
    max_concurrency: int | None = None

    def to_json(self) -> dict[str, Any]:
        """For a process that holds the model."""
        return {
            "osl_each": list(self.osl_each),
            "eos": sorted(self.eos_token_ids),
            "arrivals_s": list(self.arrivals_s),
            "max_concurrency": self.max_concurrency,
        }

    @staticmethod
    def of(found: Mapping[str, Any]) -> Demands | None:
        """What `to_json` wrote; None of nothing."""
        if not found:
            return None
        return Demands(
            osl_each=tuple(found["osl_each"]),
            eos_token_ids=frozenset(found["eos"]),
            arrivals_s=tuple(found["arrivals_s"]),
            max_concurrency=found["max_concurrency"],
        )


UNUSED_TOKEN = -1
"""What stands in `Generation.tokens` behind the end of an answer."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One timed greedy batch.

    Attributes:
        tokens: New tokens [batch, longest answer]; `UNUSED_TOKEN` behind the end of a shorter one.
        ttft_s: Seconds to the first token of the batch: the prefill.
        total_s: Seconds to the last token.
        lengths: New tokens of each request; None where all are as long as the array.
    """

    tokens: NDArray[np.int64]
    ttft_s: float
    total_s: float
    lengths: tuple[int, ...] | None = None

    @property
    def output_lengths(self) -> tuple[int, ...]:
        """New tokens of each request."""
        if self.lengths is not None:
            return self.lengths
        return (int(self.tokens.shape[-1]),) * len(self.tokens)

    @property
    def output_tokens(self) -> int:
        """New tokens of all requests."""
        return int(self.tokens.size) if self.lengths is None else sum(self.lengths)


class Session(Protocol):
    """A loaded model."""

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits of every position of one sequence [tokens, vocab]."""
        ...

    def generate(
        self, prompts: Sequence[Sequence[int]], osl: int, demands: Demands | None = None
    ) -> Generation:
        """Generate greedily, and time it.

        Args:
            prompts: Token ids of each request.
            osl: Output tokens of the longest request.
            demands: What the requests ask beyond that; None for exactly `osl` tokens of each,
                end-of-sequence ignored, all at once. What a session cannot do, its runner says in
                advance: see `pipeline.runners.abilities`.
        """
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

    @property
    def abilities(self) -> frozenset[Ability]:
        """What its sessions execute beyond one batch of equal requests."""
        ...

    def why_not(self, engine: Engine) -> str | None:
        """Why it cannot run this engine here; None when it can."""
        ...

    def open(self, engine: Engine) -> AbstractContextManager[Session]:
        """Load the engine; leaving the context frees it."""
        ...


@runtime_checkable
class CacheClearing(Protocol):
    """A session whose allocator keeps freed memory, and can be told to give it back."""

    def clear_cache(self) -> None:
        """Give back what is not in use; changes nothing that is computed."""
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
