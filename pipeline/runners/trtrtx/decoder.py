"""The engine with a cache on the card: `pipeline.runners.decode.BoundDecoder`.

Past and present of a layer are one buffer, as in `pipeline.runners.onnxruntime`. A prefill takes
fewer rows than the cache has, so its rows go in groups, each on its own part of the same buffers.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pipeline.core.errors import Fault, RecipeError
from pipeline.runners.trtrtx.engine import RtxEngine, StepContext

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

ALIGNMENT_BYTES = 256
"""Of every address that is bound: what TensorRT-RTX asks of device memory that it is given
(docstring of `IExecutionContext.set_device_memory`, 1.7.1)."""


def row_groups(batch: int, max_rows: int, row_bytes: int) -> list[tuple[int, int]]:
    """Split rows into groups (start, end) of `max_rows` at most, each aligned in the cache.

    Args:
        batch: Rows in all.
        max_rows: Most rows of one step.
        row_bytes: Size of one row of one cache tensor.

    Raises:
        RecipeError: No group of `max_rows` or fewer ends at an aligned address.
    """
    if batch <= max_rows:
        return [(0, batch)]
    unit = ALIGNMENT_BYTES // math.gcd(ALIGNMENT_BYTES, row_bytes)
    rows = max_rows // unit * unit
    if rows == 0:
        message = (
            f"got {batch} prompts at once; this engine takes {max_rows}: a row of its cache has "
            f"{row_bytes} bytes, and only every {unit}th is aligned. Make compiler.max_seq_len a "
            "multiple of 16"
        )
        raise RecipeError([Fault("", message)])
    return [(start, min(start + rows, batch)) for start in range(0, batch, rows)]


class RtxDecoder:
    """A loaded engine with a zeroed cache for a fixed number of rows."""

    def __init__(self, engine: RtxEngine, batch: int) -> None:
        """Take the cache's memory.

        Raises:
            RecipeError: The engine does not decode so many rows.
        """
        if not 1 <= batch <= engine.signature.max_batch:
            message = f"got {batch} prompts; wanted 1 to {engine.signature.max_batch}"
            raise RecipeError([Fault("", message)])
        self._engine = engine
        self._device = engine.device
        self._batch = batch
        self._buffers: dict[str, torch.Tensor] = {}
        count = batch * math.prod(engine.signature.cache_shape)
        self._caches = {
            name: self._device.zeros(count, engine.signature.cache_dtype)
            for name in engine.signature.caches
        }

    @property
    def batch(self) -> int:
        return self._batch

    @property
    def context(self) -> int:
        return self._engine.signature.context

    def step(
        self,
        input_ids: NDArray[np.int64],
        write_indices: NDArray[np.int64],
        logits_index: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        """Run one step and wait for it, as the Protocol says.

        Raises:
            RecipeError: The engine has no profile for such a step.
            PipelineError: It refuses the step.
        """
        import numpy as np

        context = self._engine.context_for(input_ids.shape[1], logits_index.shape[1])
        groups = row_groups(self._batch, context.profile.batch[1], self._engine.signature.row_bytes)
        inputs = {
            "input_ids": input_ids,
            "write_indices": write_indices,
            "logits_index": logits_index,
        }
        pieces = [
            self._run(context, start, {name: all_[start:end] for name, all_ in inputs.items()})
            for start, end in groups
        ]
        self._device.synchronize()
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _run(
        self, context: StepContext, start: int, inputs: dict[str, NDArray[np.int64]]
    ) -> NDArray[np.float32]:
        """Put one group of rows on the stream; its logits are there after `synchronize`."""
        signature = self._engine.signature
        rows, sequence = inputs["input_ids"].shape
        wanted = (*inputs["logits_index"].shape, signature.vocab_size)
        logits = self._buffer("logits", math.prod(wanted), "float32")
        addresses = {"logits": logits.data_ptr()}
        for name, values in inputs.items():
            buffer = self._buffer(name, values.size, "int64")
            self._device.upload(values, buffer)
            addresses[name] = buffer.data_ptr()
        for name, cache in self._caches.items():
            address = cache.data_ptr() + start * signature.row_bytes
            addresses[f"past_{name}"] = addresses[f"present_{name}"] = address
        context.run(signature.input_shapes(rows, sequence, wanted[1]), addresses, wanted)
        return self._device.download(logits, wanted)

    def _buffer(self, name: str, count: int, dtype: str) -> torch.Tensor:
        """Memory for one tensor of a step, kept while it is large enough.

        Groups share it: the stream keeps their order. The first group is the largest, so none is
        freed while a step uses it.
        """
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < count:
            buffer = self._buffers[name] = self._device.zeros(count, dtype)
        return buffer
