"""What a loaded engine takes and gives, and for which sizes: read from the engine itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.core.errors import CorruptError

_ID_INPUTS = {"input_ids": 2, "write_indices": 1, "logits_index": 2}
"""Inputs of int64 and their number of dimensions, as the decoder graph declares them."""
_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64"}
"""Names of `tensorrt_rtx.DataType` -> NumPy's words."""

_Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""Tensor name -> dtype and shape."""


@dataclass(frozen=True, kw_only=True)
class StepProfile:
    """One optimization profile: the smallest and largest step that it computes.

    Attributes:
        index: Its number in the engine.
        batch: Rows.
        sequence: Tokens of a row.
        logits: Positions of a row whose logits are wanted.
    """

    index: int
    batch: tuple[int, int]
    sequence: tuple[int, int]
    logits: tuple[int, int]

    def takes(self, sequence: int, logits: int) -> bool:
        """Whether it computes such a step, of few enough rows."""
        return (
            self.sequence[0] <= sequence <= self.sequence[1]
            and self.logits[0] <= logits <= self.logits[1]
        )


@dataclass(frozen=True, kw_only=True)
class EngineSignature:
    """The decoder's interface.

    Attributes:
        caches: Cache tensors without their `past_` and `present_`.
        cache_shape: Key-value heads, static length in tokens, head size.
        cache_dtype: In NumPy's words.
        vocab_size: Columns of the logits.
        profiles: In the engine's order; decode comes first.
    """

    caches: tuple[str, ...]
    cache_shape: tuple[int, int, int]
    cache_dtype: str
    vocab_size: int
    profiles: tuple[StepProfile, ...]

    @property
    def context(self) -> int:
        """Static length of the cache, tokens."""
        return self.cache_shape[1]

    @property
    def row_bytes(self) -> int:
        """Size of one row of one cache tensor."""
        return math.prod(self.cache_shape) * {"float32": 4}.get(self.cache_dtype, 2)

    @property
    def max_batch(self) -> int:
        """Rows of the largest decode step."""
        return max(profile.batch[1] for profile in self.profiles if profile.takes(1, 1))

    @property
    def logits_per_step(self) -> int:
        """Most positions of a step whose logits can be had."""
        return max(min(profile.sequence[1], profile.logits[1]) for profile in self.profiles)

    def input_shapes(self, rows: int, sequence: int, logits: int) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every input of a step."""
        return {
            "input_ids": (rows, sequence),
            "write_indices": (rows,),
            "logits_index": (rows, logits),
            **{f"past_{name}": (rows, *self.cache_shape) for name in self.caches},
        }


def read_signature(engine: Any) -> EngineSignature:
    """Read and check the interface of an engine.

    Args:
        engine: A `tensorrt_rtx.ICudaEngine`.

    Raises:
        CorruptError: It is no decoder engine of ours: a tensor is missing, of another type or
            shape, or its cache is not updated in place.
    """
    import tensorrt_rtx as trt

    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    tensors = {
        name: (
            _DTYPES.get(engine.get_tensor_dtype(name).name, engine.get_tensor_dtype(name).name),
            tuple(engine.get_tensor_shape(name)),
        )
        for name in names
    }
    inputs = {n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT}
    caches = tuple(n.removeprefix("past_") for n in names if n in inputs and n.startswith("past_"))
    _demand_names(inputs, set(names) - inputs, caches)
    _demand_in_place(engine, caches)
    signature = EngineSignature(
        caches=caches,
        cache_shape=_cache_shape(tensors, caches),
        cache_dtype=tensors[f"past_{caches[0]}"][0],
        vocab_size=tensors["logits"][1][-1],
        profiles=tuple(
            _profile(engine, i, caches) for i in range(engine.num_optimization_profiles)
        ),
    )
    if not any(profile.takes(1, 1) for profile in signature.profiles):
        raise _foreign(f"no profile takes one token per row: {signature.profiles}")
    return signature


def _cache_shape(tensors: _Tensors, caches: tuple[str, ...]) -> tuple[int, int, int]:
    """Check every tensor's type and static sizes; those of a cache without its rows.

    Sizes that a profile sets are not compared: an engine may state them or give -1.
    """
    dtype, (_, *static) = tensors[f"past_{caches[0]}"]
    wanted: dict[str, tuple[str, int, list[int]]] = {
        **{name: ("int64", rank, []) for name, rank in _ID_INPUTS.items()},
        **{f"{end}_{name}": (dtype, 4, static) for name in caches for end in ("past", "present")},
        "logits": ("float32", 3, list(tensors["logits"][1][-1:])),
    }
    for name, (kind, rank, sizes) in wanted.items():
        found, shape = tensors[name]
        if (found, len(shape), list(shape[rank - len(sizes) :])) != (kind, rank, sizes):
            raise _foreign(
                f"{name} is {found} {shape}; wanted is {kind}, {rank} dimensions ending in {sizes}"
            )
    if min(*static, tensors["logits"][1][-1]) < 1:
        raise _foreign(
            f"the cache is {static}, the logits {tensors['logits'][1]}; wanted are static sizes"
        )
    heads, context, size = static
    return heads, context, size


def _profile(engine: Any, index: int, caches: tuple[str, ...]) -> StepProfile:
    def bounds(name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        smallest, _, largest = engine.get_tensor_profile_shape(name, index)
        return tuple(smallest), tuple(largest)

    (batch, sequence), (max_batch, max_sequence) = bounds("input_ids")
    smallest, largest = bounds("logits_index")
    profile = StepProfile(
        index=index,
        batch=(batch, max_batch),
        sequence=(sequence, max_sequence),
        logits=(smallest[1], largest[1]),
    )
    for name in ("write_indices", "logits_index", *(f"past_{cache}" for cache in caches)):
        low, high = bounds(name)
        if (low[0], high[0]) != profile.batch:
            raise _foreign(
                f"profile {index} takes {low[0]} to {high[0]} rows of {name}, but {batch} to "
                f"{max_batch} of input_ids"
            )
    return profile


def _demand_names(inputs: set[str], outputs: set[str], caches: tuple[str, ...]) -> None:
    wanted_inputs = {*_ID_INPUTS, *(f"past_{name}" for name in caches or ("key.0",))}
    wanted_outputs = {"logits", *(f"present_{name}" for name in caches or ("key.0",))}
    missing = (wanted_inputs - inputs) | (wanted_outputs - outputs)
    surplus = (inputs - wanted_inputs) | (outputs - wanted_outputs)
    if missing or surplus:
        raise _foreign(f"it lacks {sorted(missing)} and has {sorted(surplus)} beside its interface")


def _demand_in_place(engine: Any, caches: tuple[str, ...]) -> None:
    """Demand an engine that expects past and present in one memory, for so they are bound.

    `get_aliased_input_tensor` names the input whose memory an output shares; its docstring (1.7.1)
    has KVCacheUpdate as the example, which is what our TensorScatter becomes.
    """
    for name in caches:
        aliased = engine.get_aliased_input_tensor(f"present_{name}")
        if aliased != f"past_{name}":
            raise _foreign(f"present_{name} is to share the memory of past_{name}, not {aliased}")


def _foreign(what: str) -> CorruptError:
    return CorruptError(
        f"the engine's interface is not that of a decoder of this pipeline: {what}; build it again "
        "with: enginesmith build RECIPE --rebuild"
    )
