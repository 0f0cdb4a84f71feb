"""The head of a safetensors file, for those who write the data themselves, piece by piece.

Source of the format: the safetensors README, "Format".
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

_ALIGNMENT_BYTES = 8
"""The header is padded with spaces to this size, so that data is aligned."""


class Described(NamedTuple):
    """One tensor: its name, its dtype as the format calls it (`BF16`), its shape and its bytes."""

    name: str
    dtype: str
    shape: Sequence[int]
    size_bytes: int


def safetensors_header(
    tensors: Iterable[Described], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Length, then JSON with dtype, shape and byte range of every tensor, one behind the other.

    Args:
        tensors: In the order of their data, which begins right after what is returned.
        metadata: Of the whole file; None writes none.
    """
    fields: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.size_bytes
        fields[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    return struct.pack("<Q", len(text)) + text
