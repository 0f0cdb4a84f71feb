"""The decode loop, shared by every runtime that executes the decoder graph.

A runtime only has to run one step on a cache that it keeps in place (`BoundDecoder.step`). Prompts
of unequal length are padded on the right: pads lie behind a row's end, no query sees them, and the
row's next token overwrites them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pipeline.core.errors import CorruptError, Fault, RecipeError
from pipeline.runners.runner import UNUSED_TOKEN, Generation, require_fit
from pipeline.runners.workload import BatchOptions

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ids = NDArray[np.int64]


class BoundDecoder(Protocol):
    """A loaded graph with a cache for a fixed number of rows, updated in place."""

    batch: int  # rows of the cache
    context: int  # its static length, tokens

    def step(self, ids: Ids, write_indices: Ids, logits_index: Ids) -> NDArray[np.float32]:
        """Run one step; gives logits [batch, n, vocab], valid until the next step.

        `ids` are [batch, sequence]; `write_indices` [batch], tokens that each row's cache already
        holds; `logits_index` [batch, n], positions inside this step whose logits are wanted.
        """


@dataclass(frozen=True)
class Prefilled:
    """State after the prompts: tokens held per row [batch], logits of their last token."""

    lengths: NDArray[np.int64]
    logits: NDArray[np.float32]  # [batch, vocab]


def prefill(decoder: BoundDecoder, prompts: Sequence[Sequence[int]]) -> Prefilled:
    """Run all prompts as one right-padded batch; RecipeError if one is missing or too long."""
    import numpy as np

    require_fit(prompts, 0, decoder.context)
    if len(prompts) != decoder.batch:
        message = f"got {len(prompts)} prompts; wanted {decoder.batch}, the rows of the cache"
        raise RecipeError([Fault("", message)])
    lengths = np.array([len(prompt) for prompt in prompts], np.int64)
    padded = np.zeros((decoder.batch, int(lengths.max())), np.int64)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    start = np.zeros(decoder.batch, np.int64)
    logits = decoder.step(padded, start, (lengths - 1)[:, None])
    return Prefilled(lengths=lengths, logits=logits[:, 0])


def greedy_steps(
    decoder: BoundDecoder, state: Prefilled, max_new_tokens: int
) -> Iterator[NDArray[np.int64]]:
    """Yield the next token of every row [batch] until the longest row has filled the context.

    CorruptError if a row's logits are not finite: with a NaN among them, it is the largest.
    """
    import numpy as np

    lengths, logits = state.lengths.copy(), state.logits
    index = np.zeros((decoder.batch, 1), np.int64)
    for produced in range(max_new_tokens):
        tokens = logits.argmax(axis=-1).astype(np.int64)
        largest = np.take_along_axis(logits, tokens[:, None], axis=-1)
        if not np.isfinite(largest).all():
            raise CorruptError(
                "logits are not finite; the engine cannot be judged: check the calibration's "
                "outliers and quantizer.keep_16bit"
            )
        yield tokens
        if produced + 1 == max_new_tokens or lengths.max() >= decoder.context:
            return
        logits = decoder.step(tokens[:, None], lengths, index)[:, 0]
        lengths += 1


class Rows:
    """Which rows of a static batch still go on, and how far each came.

    A row that has ended is computed on until the last one ends; its further tokens do not count.
    RecipeError if the requests arrive one by one: a batch has to start together.
    """

    def __init__(self, rows: int, osl: int, options: BatchOptions | None) -> None:
        import numpy as np

        if options is not None and options.arrivals_s:
            message = "this runner decodes static batches, requests cannot arrive while one runs"
            raise RecipeError([Fault("", f"{message}; leave request_rate out, or use runner=vllm")])
        limits = (osl,) * rows if options is None else options.osl_each
        self._limits = np.array(limits, np.int64)
        self._eos = np.array(sorted(options.eos_token_ids) if options else [], np.int64)
        self.ended = np.zeros(rows, bool)
        self._lengths = np.zeros(rows, np.int64)
        self._differ = options is not None

    def take(self, tokens: NDArray[np.int64]) -> bool:
        """Count the next token of each row [rows]; whether all have ended by now."""
        import numpy as np

        self._lengths += ~self.ended
        self.ended |= (self._lengths >= self._limits) | np.isin(tokens, self._eos)
        return bool(self.ended.all())

    def generation(
        self, tokens: NDArray[np.int64], started: float, first: float, ended: float
    ) -> Generation:
        """What the batch gave; `tokens` [rows, steps] may hold anything behind the end of a row."""
        import numpy as np

        lengths = None
        if self._differ:
            behind = np.arange(tokens.shape[1]) >= self._lengths[:, None]
            tokens = np.where(behind, UNUSED_TOKEN, tokens)
            lengths = tuple(self._lengths.tolist())
        ttft_s, total_s = first - started, ended - started
        return Generation(tokens=tokens, ttft_s=ttft_s, total_s=total_s, lengths=lengths)


class DecoderSession:
    """`Session` on a decoder graph; `logits_per_step`: of so many positions of a row at once."""

    def __init__(
        self, bind: Callable[[int], BoundDecoder], *, context: int, logits_per_step: int
    ) -> None:
        self.context = context
        self._bind = bind
        self._logits_per_step = logits_per_step
        self._decoder: BoundDecoder | None = None

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """With one position a step: a prefill of 8 x 1024 with all takes 2.4 GB for SmolLM2."""
        import numpy as np

        require_fit([tokens], 0, self.context)
        decoder, ids = self._decoder_for(1), np.array([tokens], np.int64)
        rows = []
        for start in range(0, len(tokens), self._logits_per_step):
            piece = ids[:, start : start + self._logits_per_step]
            index = np.arange(piece.shape[1], dtype=np.int64)[None]
            rows.append(decoder.step(piece, np.array([start]), index)[0].copy())
        return rows[0] if len(rows) == 1 else np.concatenate(rows)

    def generate(
        self, prompts: Sequence[Sequence[int]], osl: int, options: BatchOptions | None = None
    ) -> Generation:
        """Every step ends with the device's work done and the logits here."""
        import numpy as np

        require_fit(prompts, osl, self.context)
        decoder, made = self._decoder_for(len(prompts)), []
        rows = Rows(len(prompts), osl, options)
        started = time.perf_counter()
        state = prefill(decoder, prompts)
        first = time.perf_counter()
        for tokens in greedy_steps(decoder, state, osl):
            made.append(tokens)
            if rows.take(tokens):
                break
        return rows.generation(np.stack(made, axis=1), started, first, time.perf_counter())

    def stream(
        self, prompt: Sequence[int], max_new_tokens: int, eos_token_ids: frozenset[int]
    ) -> Iterator[int]:
        require_fit([prompt], 1, self.context)
        decoder = self._decoder_for(1)
        for tokens in greedy_steps(decoder, prefill(decoder, [prompt]), max_new_tokens):
            token = int(tokens[0])
            if token in eos_token_ids:
                return
            yield token

    def _decoder_for(self, batch: int) -> BoundDecoder:
        """The one in use, if it has so many rows: no query sees what a cache held before."""
        if self._decoder is None or self._decoder.batch != batch:
            self._decoder = None  # frees the old cache before the new one is made
            self._decoder = self._bind(batch)
        return self._decoder
