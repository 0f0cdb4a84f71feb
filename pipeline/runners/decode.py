"""The decode loop, shared by every runtime that executes the decoder graph.

A runtime only has to run one step on a cache that it keeps in place (`BoundDecoder.step`); ragged
prompts, positions and stopping are handled here, once. Prompts of unequal length are padded on the
right: pads lie behind a row's end, no query sees them, and the row's next token overwrites them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pipeline.core.errors import Fault, RecipeError
from pipeline.runners.session import UNUSED_TOKEN, Demands

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_PAD_ID = 0
"""Any valid token does: no query ever attends to it."""


class BoundDecoder(Protocol):
    """A loaded graph with a cache for a fixed number of rows, updated in place."""

    @property
    def batch(self) -> int:
        """Rows of the cache."""
        ...

    @property
    def context(self) -> int:
        """Static length of the cache, tokens."""
        ...

    def step(
        self,
        input_ids: NDArray[np.int64],
        write_indices: NDArray[np.int64],
        logits_index: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        """Run one step.

        Args:
            input_ids: [batch, sequence].
            write_indices: [batch], tokens that each row's cache already holds.
            logits_index: [batch, n], positions inside this step whose logits are wanted.

        Returns:
            Logits [batch, n, vocab]; valid until the next step.
        """
        ...


@dataclass(frozen=True)
class Prefilled:
    """State after the prompts: tokens held per row [batch], logits of their last token."""

    lengths: NDArray[np.int64]
    logits: NDArray[np.float32]  # [batch, vocab]


def prefill(decoder: BoundDecoder, prompts: Sequence[Sequence[int]]) -> Prefilled:
    """Run all prompts as one right-padded batch.

    Raises:
        RecipeError: An empty prompt, one longer than the context, or another number than rows.
    """
    import numpy as np

    lengths = np.array([len(prompt) for prompt in prompts], np.int64)
    if len(prompts) != decoder.batch or lengths.min() < 1 or lengths.max() > decoder.context:
        raise RecipeError(
            [
                Fault(
                    "",
                    f"got {len(prompts)} prompts of {lengths.tolist()} tokens; wanted "
                    f"{decoder.batch} of 1 to {decoder.context} tokens each",
                )
            ]
        )
    padded = np.full((decoder.batch, int(lengths.max())), _PAD_ID, np.int64)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    start = np.zeros(decoder.batch, np.int64)
    logits = decoder.step(padded, start, (lengths - 1)[:, None])
    return Prefilled(lengths=lengths, logits=logits[:, 0])


def greedy_steps(
    decoder: BoundDecoder, state: Prefilled, max_new_tokens: int
) -> Iterator[NDArray[np.int64]]:
    """Yield the next token of every row [batch], `max_new_tokens` times at most.

    Ends early when the longest row has filled the context.
    """
    import numpy as np

    lengths, logits = state.lengths.copy(), state.logits
    index = np.zeros((decoder.batch, 1), np.int64)
    for produced in range(max_new_tokens):
        tokens = logits.argmax(axis=-1).astype(np.int64)
        yield tokens
        if produced + 1 == max_new_tokens or lengths.max() >= decoder.context:
            return
        logits = decoder.step(tokens[:, None], lengths, index)[:, 0]
        lengths += 1


class Rows:
    """Which rows of a batch still go on, and how far each came.

    The batch is static: a row that has ended is computed on until the last one ends, and its
    further tokens count for nothing.
    """

    def __init__(self, rows: int, osl: int, demands: Demands | None) -> None:
        """Nothing has come yet.

        Args:
            rows: How many.
            osl: Output tokens of each, where `demands` does not say it.
            demands: Of the batch; None for `osl` tokens of each row.

        Raises:
            RecipeError: The requests arrive one by one; a batch has to start together.
        """
        import numpy as np

        if demands is not None and demands.arrivals_s:
            message = "this runner decodes static batches, requests cannot arrive while one runs"
            raise RecipeError([Fault("", f"{message}; leave request_rate out, or use runner=vllm")])
        limits = (osl,) * rows if demands is None else demands.osl_each
        self._limits = np.array(limits, np.int64)
        self._eos = np.array(sorted(demands.eos_token_ids) if demands else [], np.int64)
        self._ended = np.zeros(rows, bool)
        self._lengths = np.zeros(rows, np.int64)
        self._differ = demands is not None

    def take(self, tokens: NDArray[np.int64]) -> bool:
        """Count the next token of each row [rows]; whether all have ended by now."""
        import numpy as np

        self._lengths += ~self._ended
        self._ended |= (self._lengths >= self._limits) | np.isin(tokens, self._eos)
        return bool(self._ended.all())

    @property
    def ended(self) -> NDArray[np.bool_]:
        """Rows that have ended [rows]."""
        return self._ended

    @property
    def lengths(self) -> tuple[int, ...] | None:
        """Tokens of each row, as `Generation.lengths`; None where nothing lets them differ."""
        return tuple(int(length) for length in self._lengths) if self._differ else None

    def cut(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens [rows, steps] with `UNUSED_TOKEN` behind the end of each row."""
        import numpy as np

        if not self._differ:
            return tokens
        behind = np.arange(tokens.shape[1]) >= self._lengths[:, None]
        return np.where(behind, UNUSED_TOKEN, tokens)


def generate_greedy(
    decoder: BoundDecoder, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> NDArray[np.int64]:
    """Greedy tokens [batch, max_new_tokens], end-of-sequence ignored."""
    import numpy as np

    state = prefill(decoder, prompts)
    return np.stack(list(greedy_steps(decoder, state, max_new_tokens)), axis=1)


def stream_greedy(
    decoder: BoundDecoder,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    eos_token_ids: frozenset[int],
) -> Iterator[int]:
    """Yield tokens of a single row until any end-of-sequence id, which is not yielded."""
    state = prefill(decoder, [prompt])
    for tokens in greedy_steps(decoder, state, max_new_tokens):
        token = int(tokens[0])
        if token in eos_token_ids:
            return
        yield token
