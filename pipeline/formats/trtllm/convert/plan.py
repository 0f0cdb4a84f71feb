"""The plan of `rank0.safetensors`: each tensor, its sources and what is done to their bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

FP8 = "float8_e4m3fn"
"""NumPy (ml_dtypes) name of E4M3."""
_ITEM_BYTES: Mapping[str, int] = {"bfloat16": 2, "float16": 2, "float32": 4, FP8: 1}


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Some rows of one source tensor.

    Attributes:
        tensor: Its name.
        rows: First and one past the last row; None for all.
        old_scale: Weight scale of its codes; equal to `new_scale` where nothing is rounded.
        new_scale: Weight scale that they get.
    """

    tensor: str
    rows: tuple[int, int] | None = None
    old_scale: float = 1.0
    new_scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class PlannedTensor:
    """One tensor of the file: pieces on top of each other, or one number.

    Attributes:
        name: TensorRT-LLM's.
        dtype: NumPy (ml_dtypes) name; pieces of another float type are cast.
        shape: Of the whole.
        pieces: Sources, in the order of their rows; empty for a number.
        value: The number of a float32 scale of shape (1,).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...] = ()
    value: float | None = None

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class TensorPlan:
    """The whole file.

    Attributes:
        tensors: In file order.
        fp8: TensorRT-LLM's names of the FP8 linears.
        excluded: Those of the 16-bit ones, lm_head first: `exclude_modules`.
        requantized: Source modules whose codes move to another scale.
        merged_inputs: Linears whose parts had different activation scales; the largest is used.
    """

    tensors: tuple[PlannedTensor, ...]
    fp8: tuple[str, ...]
    excluded: tuple[str, ...]
    requantized: tuple[str, ...]
    merged_inputs: tuple[str, ...]
