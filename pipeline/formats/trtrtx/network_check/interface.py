"""The decoder's interface: which tensors go in and come out, with dtypes and shapes.

Stated here a second time, apart from the code that writes the graph, so that an input which got
lost on the way is missed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pipeline.formats.trtrtx.network_check.errors import CheckError

ANY = -1
"""A dynamic dimension."""

Signature = Mapping[str, tuple[str, tuple[int, ...]]]
"""Tensor name -> dtype name (NumPy's words) and shape, `ANY` for dynamic dimensions."""


@dataclass(frozen=True, kw_only=True)
class DecoderInterface:
    """Sizes that the decoder's inputs and outputs follow from.

    Attributes:
        num_hidden_layers: Decoder layers in this graph, the cut's number for a cut.
        num_key_value_heads: Key and value heads.
        context: Static cache length, tokens.
        head_dim: Size of one head.
        rotary_dim: How many of its leading elements the rotary embedding turns.
        vocab_size: Columns of the logits.
        dtype: Dtype of the cache in the graph for RTX.
    """

    num_hidden_layers: int
    num_key_value_heads: int
    context: int
    head_dim: int
    rotary_dim: int
    vocab_size: int
    dtype: Literal["bfloat16", "float16"]

    @property
    def cache_names(self) -> tuple[str, ...]:
        """Cache tensors without their `past_` or `present_`."""
        return tuple(
            f"{part}.{layer}"
            for layer in range(self.num_hidden_layers)
            for part in ("key", "value")
        )

    def inputs(self, dtype: str) -> Signature:
        """Inputs of the graph whose activations are `dtype`."""
        return {
            "input_ids": ("int64", (ANY, ANY)),
            "write_indices": ("int64", (ANY,)),
            "logits_index": ("int64", (ANY, ANY)),
            **self._caches("past", dtype),
        }

    def outputs(self, dtype: str) -> Signature:
        """Outputs of the graph whose activations are `dtype`; logits are always float32."""
        return {
            "logits": ("float32", (ANY, ANY, self.vocab_size)),
            **self._caches("present", dtype),
        }

    def _caches(self, prefix: str, dtype: str) -> Signature:
        shape = (ANY, self.num_key_value_heads, self.context, self.head_dim)
        return {f"{prefix}_{name}": (dtype, shape) for name in self.cache_names}


def check_signature(what: str, got: Signature, wanted: Signature) -> None:
    """Demand the same names, dtypes and shapes.

    Args:
        what: Whose tensors these are, for the message.
        got: As found.
        wanted: As the decoder graph defines them.

    Raises:
        CheckError: Names all tensors that are missing, unexpected or different.
    """
    faults = [f"{name} is missing" for name in wanted if name not in got]
    faults += [f"{name} is not part of the decoder" for name in got if name not in wanted]
    faults += [
        f"{name} is {_describe(got[name])}, wanted {_describe(wanted[name])}"
        for name in wanted
        if name in got and got[name] != wanted[name]
    ]
    if faults:
        raise CheckError(
            f"{what} differ from the decoder's interface: {'; '.join(faults)}; "
            "the graph was written for another shape, or the parser dropped or changed a tensor"
        )


def _describe(tensor: tuple[str, tuple[int, ...]]) -> str:
    dtype, shape = tensor
    return f"{dtype} [{', '.join('*' if size == ANY else str(size) for size in shape)}]"
