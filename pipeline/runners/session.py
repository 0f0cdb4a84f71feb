"""A loaded model, whatever executes it, and what it is asked: token ids in, token ids out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import pydantic.dataclasses

from pipeline.core.errors import Fault, PipelineError, RecipeError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

UNUSED_TOKEN = -1
"""What stands in `Generation.tokens` behind the end of an answer."""


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """What a batch asks beyond its prompts and the longest answer.

    Attributes:
        osl_each: Most output tokens of each request.
        eos_token_ids: Each ends an answer, as its last token; empty to ignore them all.
        arrivals_s: When each request arrives after the start; empty for all at once.
        max_concurrency: Most at once where they arrive; None for no bound.
    """

    osl_each: tuple[int, ...]
    eos_token_ids: frozenset[int] = frozenset()
    arrivals_s: tuple[float, ...] = ()
    max_concurrency: int | None = None


@dataclass(frozen=True, kw_only=True)
class RequestTiming:
    """The times of one request, where the runtime keeps them.

    Attributes:
        ttft_ms: From its arrival to its first token; waiting for others is in it.
        request_latency_ms: From its arrival to its last token.
        itl_ms: (request_latency_ms - ttft_ms) / (tokens - 1); None if it has one token. TPOT in
            vLLM's benchmark.
        arrival_s: After the first; None where all started together.
    """

    ttft_ms: float
    request_latency_ms: float
    itl_ms: float | None
    arrival_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One timed greedy batch.

    Attributes:
        tokens: New tokens [batch, longest answer]; `UNUSED_TOKEN` behind the end of a shorter one.
        ttft_s: Seconds until every request has its first token; of a static batch the prefill.
        total_s: Seconds to the last token.
        lengths: New tokens of each request; None where all are as long as the array.
        requests: In the order of the prompts; empty where not known.
    """

    tokens: NDArray[np.int64]
    ttft_s: float
    total_s: float
    lengths: tuple[int, ...] | None = None
    requests: tuple[RequestTiming, ...] = ()

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
        ...

    def generate(
        self, prompts: Sequence[Sequence[int]], osl: int, options: BatchOptions | None = None
    ) -> Generation:
        """Generate a batch, and time it; `osl` are the output tokens of the longest request.

        `options` None: so many of each, end-of-sequence ignored, all at once.

        Raises:
            RecipeError: A prompt and its answer do not fit the context together.
        """
        ...

    def stream(
        self, prompt: Sequence[int], max_new_tokens: int, eos_token_ids: frozenset[int]
    ) -> Iterator[int]:
        """Yield tokens until an end-of-sequence id, which is not yielded, or a full context.

        Raises:
            RecipeError: The prompt leaves no room for an answer.
        """
        ...


@runtime_checkable
class CacheClearing(Protocol):
    """A session whose allocator keeps freed memory, and can give it back."""

    def clear_cache(self) -> None: ...


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
