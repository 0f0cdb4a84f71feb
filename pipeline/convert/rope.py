"""Rotary tables, computed in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def rope_tables(
    *, theta: float, rotary_dim: int, context: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Cosine and sine, each [context, rotary_dim / 2].

    Row p, column i is the angle p * theta^(-2i / rotary_dim) (RoFormer, arXiv:2104.09864, section
    3.4.2). The graph pairs element i with i + rotary_dim / 2, as Hugging Face models do
    (`interleaved=0` of the ONNX operator), not with its neighbour as the paper does.
    """
    import numpy as np

    exponents = np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim
    angles = np.outer(np.arange(context, dtype=np.float64), theta**-exponents)
    return np.cos(angles), np.sin(angles)
