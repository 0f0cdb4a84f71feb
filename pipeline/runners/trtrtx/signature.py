"""What a loaded engine takes and gives, and for which sizes: read from the engine itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pipeline.core.errors import CorruptError

_ID_INPUTS = {"input_ids": 2, "write_indices": 1, "logits_index": 2}
"""Inputs of int64 and their number of dimensions, as the decoder graph declares them."""
_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64"}
"""Names of `tensorrt_rtx.DataType` -> NumPy's words."""


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
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    shapes = {name: tuple(engine.get_tensor_shape(name)) for name in names}
    caches = tuple(name.removeprefix("past_") for name in names if name.startswith("past_"))
    if not caches or "logits" not in names:
        raise _foreign(f"it has {names}")
    _require_interface(engine, shapes, caches)
    heads, context, size = shapes[f"past_{caches[0]}"][1:]
    return EngineSignature(
        caches=caches,
        cache_shape=(heads, context, size),
        cache_dtype=_dtype(engine, f"past_{caches[0]}"),
        vocab_size=shapes["logits"][-1],
        profiles=tuple(_profile(engine, i) for i in range(engine.num_optimization_profiles)),
    )


def _require_interface(
    engine: Any, shapes: dict[str, tuple[int, ...]], caches: tuple[str, ...]
) -> None:
    """Compare mode, type and shape of every tensor, and where the new cache is written.

    Of a cache the sizes behind the rows are compared, of the others the number of dimensions.
    `get_aliased_input_tensor` names the input whose memory an output shares; its docstring (1.7.1)
    has KVCacheUpdate as the example, which is what our TensorScatter becomes.
    """
    ends = {"past": "INPUT", "present": "OUTPUT"}
    dtype, static = _dtype(engine, f"past_{caches[0]}"), shapes[f"past_{caches[0]}"][1:]
    wanted: dict[str, tuple[Any, ...]] = {
        **{name: ("INPUT", "int64", rank) for name, rank in _ID_INPUTS.items()},
        **{f"{end}_{n}": (mode, dtype, static) for end, mode in ends.items() for n in caches},
        "logits": ("OUTPUT", "float32", 3),
    }
    found = {
        name: (
            engine.get_tensor_mode(name).name,
            _dtype(engine, name),
            shape[1:] if name.startswith(("past_", "present_")) else len(shape),
        )
        for name, shape in shapes.items()
    }
    for name in sorted({*wanted, *found}):
        if found.get(name) != wanted.get(name):
            raise _foreign(f"{name} is {found.get(name)}, wanted {wanted.get(name)}")
    for name in caches:
        aliased = engine.get_aliased_input_tensor(f"present_{name}")
        if aliased != f"past_{name}":
            raise _foreign(f"present_{name} is to share the memory of past_{name}, not {aliased}")


def _dtype(engine: Any, name: str) -> str:
    dtype = engine.get_tensor_dtype(name).name
    return _DTYPES.get(dtype, str(dtype))


def _profile(engine: Any, index: int) -> StepProfile:
    low, _, high = engine.get_tensor_profile_shape("input_ids", index)
    fewest, _, most = engine.get_tensor_profile_shape("logits_index", index)
    return StepProfile(
        index=index,
        batch=(low[0], high[0]),
        sequence=(low[1], high[1]),
        logits=(fewest[1], most[1]),
    )


def _foreign(what: str) -> CorruptError:
    return CorruptError(
        f"the engine's interface is not that of a decoder of this pipeline: {what}; build it again "
        "with: enginesmith build RECIPE --rebuild"
    )
