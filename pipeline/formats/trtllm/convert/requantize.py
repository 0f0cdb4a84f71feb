"""Moves E4M3 codes to a larger scale, by table, and says what that costs.

There are 256 codes, so a new scale is a table of 256 entries, and the error that rounding a second
time adds follows exactly from how often each code occurs. Neither needs the tensor in memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


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
