"""What it takes to compute one kind of layer, and how tensors are represented.

Values are NumPy arrays. float32, float16 and bfloat16 tensors are all computed in float32 and
*not* rounded to 16 bit: the check asks whether the network means what the graph means, and without
rounding the answer is sharp. FP8 tensors hold E4M3 codes (`ml_dtypes.float8_e4m3fn`).

A rule lists the attributes that it reads. An attribute that the binding offers and no rule reads
may change the meaning, so a layer class with an unlisted one is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.formats.trtrtx.network_check.errors import CheckError
from pipeline.formats.trtrtx.network_check.network import NUMPY_NAMES, Layer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[Any]
else:
    Array = Any

Values = Sequence["Array | None"]
"""Input values of a layer; None where an optional input is absent."""


@dataclass(frozen=True)
class Rule:
    """How to compute a kind of layer.

    Attributes:
        evaluate: Input values to the one output value.
        attributes: The attributes of this kind's class, beyond those of every layer.
    """

    evaluate: Callable[[Layer, Values], Array]
    attributes: frozenset[str] = frozenset()


def unknown(layer: Layer, what: str) -> CheckError:
    """The error for a layer that may mean something which no rule covers."""
    return CheckError(
        f"{layer}: {what} is unknown to the network check, which therefore cannot vouch for the "
        "network; write the graph without it, or teach the network check its meaning"
    )


def representation(layer: Layer, dtype: Any) -> np.dtype[Any]:
    """NumPy dtype of the arrays that stand for a tensor of TensorRT's `dtype`.

    Raises:
        CheckError: No rule knows this dtype.
    """
    import ml_dtypes  # noqa: F401  registers float8 with NumPy
    import numpy as np

    if dtype.name not in NUMPY_NAMES:
        raise unknown(layer, f"dtype {dtype.name}")
    return np.dtype("float32" if dtype.name in ("BF16", "HALF") else NUMPY_NAMES[dtype.name])


def demand(layer: Layer, **wanted: Any) -> None:
    """Refuse a layer unless its attributes have the only values that a rule covers.

    Enum attributes are compared by name.
    """
    for name, value in wanted.items():
        got = getattr(layer.layer, name)
        got = getattr(got, "name", got)
        if got != value:
            raise unknown(layer, f"{name} = {got}")


def take(layer: Layer, values: Values, *counts: int) -> list[Array]:
    """The inputs of a layer, which must be as many as one of `counts` and all present."""
    found = [value for value in values if value is not None]
    if len(found) != len(values) or len(found) not in counts:
        raise unknown(layer, f"a form with {len(found)} of {len(values)} inputs, wanted {counts}")
    return found


def choose(layer: Layer, attribute: str, table: dict[str, Any]) -> Any:
    """What `table` holds for the value of an enum attribute."""
    got = getattr(layer.layer, attribute)
    if got.name not in table:
        raise unknown(layer, f"{attribute} = {got.name}")
    return table[got.name]
