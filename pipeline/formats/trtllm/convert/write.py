"""Streams a plan into `rank0.safetensors`, and checks the file afterwards.

The header is written first, since every size is known from the plan; then tensor after tensor goes
through a memory map in pieces. Resident at a time: at most one source tensor.
"""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pipeline.core.errors import CorruptError, Fault, RecipeError
from pipeline.core.progress import progress
from pipeline.core.safetensors_files import TensorSpec, read_header, safetensors_header
from pipeline.formats.trtllm.convert.plan import Piece, PlannedTensor, TensorPlan
from pipeline.formats.trtllm.convert.requantize import added_error, requantization_table
from pipeline.quant.unified import UnifiedCheckpoint

if TYPE_CHECKING:
    from numpy.typing import NDArray

WEIGHTS_FILE = "rank0.safetensors"
_CHUNK_BYTES = 1 << 20
"""Counting codes takes eight times as much: NumPy counts in 64-bit integers."""


def write_tensors(
    checkpoint: UnifiedCheckpoint, plan: TensorPlan, out_dir: Path
) -> dict[str, float]:
    """Write `rank0.safetensors` into `out_dir`, whole or not at all, and check it.

    Returns:
        Relative error that rounding a second time added, by source module; see `added_error`.

    Raises:
        RecipeError: A value does not fit the 16-bit dtype.
        CorruptError: A source tensor is damaged, or the written file is not what was planned.
    """
    errors: dict[str, float] = {}
    descriptor, private = tempfile.mkstemp(prefix=".partial-", dir=out_dir)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(_header(plan))
            with progress("Converting", len(plan.tensors), "tensors") as done:
                for tensor in plan.tensors:
                    errors |= _write_tensor(checkpoint, tensor, stream)
                    done(1)
            stream.flush()
            os.fsync(stream.fileno())
        Path(private).chmod(0o644)
        Path(private).rename(out_dir / WEIGHTS_FILE)
    finally:
        Path(private).unlink(missing_ok=True)
    verify_written(out_dir, plan)
    return errors


def _header(plan: TensorPlan) -> bytes:
    return safetensors_header(
        TensorSpec(tensor.name, tensor.dtype, tensor.shape) for tensor in plan.tensors
    )


def _write_tensor(
    checkpoint: UnifiedCheckpoint, tensor: PlannedTensor, stream: BinaryIO
) -> dict[str, float]:
    """Append one tensor; returns the error of each module in it that was rounded again."""
    if tensor.value is not None:
        stream.write(struct.pack("<f", tensor.value))
        return {}
    errors: dict[str, float] = {}
    for piece in tensor.pieces:
        if piece.old_scale != piece.new_scale:
            module = piece.tensor.removesuffix(".weight")
            errors[module] = _write_requantized(checkpoint, piece, stream)
        else:
            for rows in _row_blocks(checkpoint, piece):
                stream.write(_cast(rows, tensor).tobytes())
    return errors


def _row_blocks(checkpoint: UnifiedCheckpoint, piece: Piece) -> Iterator[NDArray[Any]]:
    """The piece in blocks of some megabytes."""
    array = checkpoint.read(piece.tensor)
    start, stop = piece.rows or (0, array.shape[0])
    step = max(1, _CHUNK_BYTES // max(1, array[:1].nbytes))
    for first in range(start, stop, step):
        yield array[first : min(first + step, stop)]


def _cast(rows: NDArray[Any], tensor: PlannedTensor) -> NDArray[Any]:
    """The rows in the tensor's dtype, unchanged where they have it.

    Raises:
        RecipeError: A finite value became infinite: float16 ends at 65504.
    """
    import numpy as np

    wanted = np.dtype(tensor.dtype)
    if rows.dtype == wanted:
        return rows
    with np.errstate(over="ignore"):
        cast: NDArray[Any] = rows.astype(np.float32).astype(wanted)
    if (np.isinf(cast) & np.isfinite(rows)).any():
        raise RecipeError(
            [Fault(tensor.name, f"has values beyond the range of {tensor.dtype}; use bfloat16")]
        )
    return cast


def _write_requantized(checkpoint: UnifiedCheckpoint, piece: Piece, stream: BinaryIO) -> float:
    """Append codes moved to the new scale; returns the relative error of that."""
    import numpy as np

    table = requantization_table(piece.old_scale, piece.new_scale)
    counts = np.zeros(256, np.int64)
    for rows in _row_blocks(checkpoint, piece):
        codes = rows.view(np.uint8)
        counts += np.bincount(codes.ravel(), minlength=256)
        stream.write(table[codes].tobytes())
    return added_error(counts, piece.old_scale, piece.new_scale)


def verify_written(out_dir: Path, plan: TensorPlan) -> None:
    """Compare the header of the written file with the plan.

    Raises:
        CorruptError: Names the first tensor that is missing, extra, or of another shape or dtype.
    """
    path = out_dir / WEIGHTS_FILE
    found = read_header(path)
    again = "convert again"
    for tensor in plan.tensors:
        entry = found.pop(tensor.name, None)
        if entry is None:
            raise CorruptError(f"{path}: tensor {tensor.name} was not written; {again}")
        if entry.shape != tensor.shape:
            raise CorruptError(
                f"{path}: tensor {tensor.name} has shape {entry.shape}, planned {tensor.shape}; "
                f"{again}"
            )
        if entry.dtype != tensor.dtype or entry.size_bytes != tensor.size_bytes:
            raise CorruptError(
                f"{path}: tensor {tensor.name} is {entry.size_bytes} bytes of {entry.dtype}, "
                f"planned {tensor.size_bytes} of {tensor.dtype}; {again}"
            )
    if found:
        raise CorruptError(f"{path}: tensor {min(found)} was not planned; {again}")
