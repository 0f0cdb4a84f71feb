"""Holds an engine on the card and runs the decode loop; the memory goes when it ends.

    python -m pipeline.runners.trtrtx.child --plan model.engine [--runtime-cache FILE] ...

Requests and answers are those of `pipeline.runners.vllm.child`, so only token ids and logits cross
between the processes. What TensorRT-RTX prints goes to standard error.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import CorruptError, PipelineError
from pipeline.runners.decode import Rows, greedy_steps, prefill, stream_greedy
from pipeline.runners.session import Demands
from pipeline.runners.trtrtx.decoder import RtxDecoder
from pipeline.runners.trtrtx.device import CudaDevice, StreamDevice
from pipeline.runners.trtrtx.engine import LoadSettings, RtxEngine
from pipeline.runners.vllm.child import Channel, serve

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class RtxModel:
    """`pipeline.runners.vllm.child.Model` on one loaded engine."""

    def __init__(self, engine: RtxEngine) -> None:
        self._engine = engine
        self._decoder: RtxDecoder | None = None

    def logits(self, tokens: Sequence[int]) -> tuple[tuple[int, int], bytes]:
        """Every position's logits, as many in a step as a profile gives.

        A profile with one position per step, as they are compiled, makes this one decode step per
        token: giving them all at once would cost a prefill 2.4 GB for SmolLM2 at 8 x 1024.
        """
        import numpy as np

        decoder = self._decoder_for(1)
        ids, most = np.array([tokens], np.int64), self._engine.signature.logits_per_step
        rows = []
        for start in range(0, len(tokens), most):
            piece = ids[:, start : start + most]
            index = np.arange(piece.shape[1], dtype=np.int64)[None]
            rows.append(decoder.step(piece, np.array([start]), index)[0])
        logits = np.concatenate(rows)
        return logits.shape, logits.astype("<f4").tobytes()

    def generate(
        self, prompts: Sequence[Sequence[int]], osl: int, demands: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Time one batch. Every step ends with the card's work done and the logits here."""
        import numpy as np

        decoder, made = self._decoder_for(len(prompts)), []
        rows = Rows(len(prompts), osl, Demands.of(demands))
        started = time.perf_counter()
        state = prefill(decoder, prompts)
        first = time.perf_counter()
        for tokens in greedy_steps(decoder, state, osl):
            _demand_finite(np.take_along_axis(decoder.newest[:, 0], tokens[:, None], axis=-1))
            made.append(tokens)
            if rows.take(tokens):
                break
        ended = time.perf_counter()
        return {
            "tokens": rows.cut(np.stack(made, axis=1)).tolist(),
            "ttft_s": first - started,
            "total_s": ended - started,
            "lengths": rows.lengths,
        }

    def stream(
        self, prompt: Sequence[int], max_new_tokens: int, stop: Sequence[int]
    ) -> Iterator[int]:
        decoder = self._decoder_for(1)
        for token in stream_greedy(
            decoder, prompt, max_new_tokens=max_new_tokens, eos_token_ids=frozenset(stop)
        ):
            _demand_finite(decoder.newest.max(axis=-1))
            yield token
        _demand_finite(decoder.newest.max(axis=-1))  # the token that ended it is not yielded

    def _decoder_for(self, batch: int) -> RtxDecoder:
        """The decoder in use, or a new one when the number of rows changed."""
        if self._decoder is None or self._decoder.batch != batch:
            self._decoder = None  # frees the old cache before the new one is made
            self._decoder = RtxDecoder(self._engine, batch)
        return self._decoder


def _demand_finite(largest: NDArray[np.float32]) -> None:
    """Check the largest logit of each row: with a NaN in the row, it is that NaN."""
    import numpy as np

    if not np.isfinite(largest).all():
        bad = int((~np.isfinite(largest)).sum())
        raise CorruptError(
            f"TensorRT-RTX gave logits that are not finite in {bad} of {largest.size} rows; the "
            "engine cannot be judged: check the calibration's outliers and quantizer.keep_16bit"
        )


def _end_group() -> None:
    """The caller is gone: end this process, so that no killed caller leaves a GPU taken."""
    os.killpg(0, signal.SIGKILL)


def main(arguments: Sequence[str], open_device: Callable[[], StreamDevice] = CudaDevice) -> None:
    """Load the engine and serve.

    Standard output becomes the log's, for TensorRT-RTX's logger prints to it.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--kernel-specialization", required=True)
    parser.add_argument("--runtime-cache", type=Path)
    options = parser.parse_args(arguments)
    source, sink = os.dup(0), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    channel = Channel(source, sink, _end_group)
    settings = LoadSettings(
        kernel_specialization=options.kernel_specialization, runtime_cache=options.runtime_cache
    )
    try:
        engine = RtxEngine(options.plan, open_device(), settings)
    except PipelineError as error:
        channel.send({"kind": "error", "message": f"{type(error).__name__}: {error}"})
        return
    serve(channel, RtxModel(engine))
    engine.save_runtime_cache()


if __name__ == "__main__":
    main(sys.argv[1:])
