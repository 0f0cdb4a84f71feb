"""Streams a plan into `rank0.safetensors`, and checks the file afterwards.

The header is written first, since every size is known from the plan; then tensor after tensor goes
through a memory map in pieces. Resident at a time: at most one source tensor. E4M3 codes move to a
larger scale by a table of 256 entries, and what that costs follows from how often each code occurs.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pipeline.core.errors import CorruptError, Fault, RecipeError
from pipeline.core.progress import progress
from pipeline.core.safetensors_files import TensorSpec, read_header, safetensors_header
from pipeline.formats.trtllm.convert.tensors import FP8, Piece, PlannedTensor, TensorPlan
from pipeline.quant.unified import UnifiedCheckpoint

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

WEIGHTS_FILE = "rank0.safetensors"
_NOT_FINITE = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000, FP8: 0x7F}
"""Bits that are all set in NaN and infinity (IEEE 754; for E4M3 the OCP 8-bit specification)."""
MAX_ADDED_ERROR = 0.1
"""Largest relative error of a tensor that rounding to the scale of its group may add. Rounding
E4M3 once more costs 0.02 to 0.04 (q, k, v, gate and up of SmolLM2, 2026-11-24); ten percent means
that most values fell below the smallest code, and 1.0 that all of them became 0."""
_CHUNK_BYTES = 1 << 20
"""Counting codes takes eight times as much: NumPy counts in 64-bit integers."""


def write_tensors(
    checkpoint: UnifiedCheckpoint, plan: TensorPlan, out_dir: Path
) -> dict[str, float]:
    """Write `rank0.safetensors` into `out_dir`, a private folder, and check it.

    Returns:
        Relative error that rounding a second time added, by source module; see `added_error`.

    Raises:
        RecipeError: A value does not fit the 16-bit dtype, or rounding a second time loses more
            than `MAX_ADDED_ERROR`.
        CorruptError: A source tensor is damaged or holds NaN or infinite values, or the written
            file is not what was planned.
    """
    errors: dict[str, float] = {}
    with (
        (out_dir / WEIGHTS_FILE).open("wb") as stream,
        progress("Converting", len(plan.tensors), "tensors") as done,
    ):
        stream.write(
            safetensors_header(TensorSpec(one.name, one.dtype, one.shape) for one in plan.tensors)
        )
        for tensor in plan.tensors:
            errors |= _write_tensor(checkpoint, tensor, stream)
            done(1)
    planned = {one.name: (one.dtype, one.shape) for one in plan.tensors}
    written = read_header(out_dir / WEIGHTS_FILE)
    if {name: (entry.dtype, entry.shape) for name, entry in written.items()} != planned:
        raise CorruptError(f"{out_dir / WEIGHTS_FILE} is not as planned; convert again")
    return errors


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
        rows = array[first : min(first + step, stop)]
        if not _all_finite(rows):
            raise CorruptError(
                f"{checkpoint.entry(piece.tensor).file}: tensor {piece.tensor} holds NaN or "
                "infinite values; make the checkpoint again"
            )
        yield rows


def _all_finite(rows: NDArray[Any]) -> bool:
    """Whether no element is NaN or infinite, by its exponent's bits; E4M3 has a NaN only."""
    import numpy as np

    mask = _NOT_FINITE[str(rows.dtype)]
    bits = rows.view(f"uint{rows.dtype.itemsize * 8}")
    return not bool(((bits & np.array(mask, bits.dtype)) == mask).any())


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
    error = added_error(counts, piece.old_scale, piece.new_scale)
    if error > MAX_ADDED_ERROR:
        raise RecipeError(
            [
                Fault(
                    piece.tensor,
                    f"has scale {piece.old_scale:g}, a linear that it is fused with "
                    f"{piece.new_scale:g}; rounding to that adds a relative error of {error:.2f}, "
                    f"at most {MAX_ADDED_ERROR} is allowed: quantize again with one scale for "
                    "q, k, v and one for gate, up",
                )
            ]
        )
    return error


def requantization_table(old_scale: float, new_scale: float) -> NDArray[np.uint8]:
    """For each code, the code nearest to `value * old_scale / new_scale`; [256].

    In float32 and in this order of operations, as `FP8Linear.postprocess` of TensorRT-LLM does it
    (`quantization/layers.py`, index number 790827869). NaN stays NaN.

    Args:
        old_scale: Scale of the codes.
        new_scale: At least as large, so that nothing overflows.
    """
    import ml_dtypes
    import numpy as np

    values = _values() * np.float32(old_scale) / np.float32(new_scale)
    table: NDArray[np.uint8] = values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return table


def added_error(counts: NDArray[np.int64], old_scale: float, new_scale: float) -> float:
    """Root of the sum of squared changes over the sum of squared values, a share (0.02 is 2 %).

    Args:
        counts: How often each code occurs, [256].
        old_scale: Scale of the codes that were counted.
        new_scale: Scale after `requantization_table`.
    """
    import numpy as np

    values = _values().astype(np.float64)
    old = values * old_scale
    new = values[requantization_table(old_scale, new_scale)] * new_scale
    seen = (counts > 0) & np.isfinite(values)
    total = float((counts[seen] * old[seen] ** 2).sum())
    changed = float((counts[seen] * (new[seen] - old[seen]) ** 2).sum())
    return (changed / total) ** 0.5 if total else 0.0


def _values() -> NDArray[np.float32]:
    """The value of every code, [256]."""
    import ml_dtypes
    import numpy as np

    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    values: NDArray[np.float32] = codes.astype(np.float32)
    return values
