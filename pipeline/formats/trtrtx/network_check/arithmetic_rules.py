"""Elementwise layers, reductions, casts, FP8 quantization and matrix multiplication."""

from __future__ import annotations

from pipeline.formats.trtrtx.network_check.network import Layer
from pipeline.formats.trtrtx.network_check.rules import (
    Array,
    Rule,
    Values,
    choose,
    demand,
    representation,
    take,
    unknown,
)

_E4M3_MAX = 448.0
"""Largest finite E4M3 value (OCP 8-bit floating point, section 5)."""


def _elementwise(layer: Layer, values: Values) -> Array:
    """Two inputs of equal rank and dtype; axes of size 1 stretch."""
    import numpy as np

    a, b = take(layer, values, 2)
    if a.dtype != b.dtype or a.ndim != b.ndim:
        raise unknown(layer, f"inputs {a.dtype} of rank {a.ndim} and {b.dtype} of rank {b.ndim}")
    table = {
        "SUM": np.add,
        "SUB": np.subtract,
        "PROD": np.multiply,
        "MAX": np.maximum,
        "MIN": np.minimum,
        "FLOOR_DIV": np.floor_divide,
        "EQUAL": np.equal,
        "LESS": np.less,
        "GREATER": np.greater,
        "AND": np.logical_and,
        "OR": np.logical_or,
    }
    if a.dtype.kind == "f":  # Of integers, TensorRT's DIV truncates.
        table["DIV"] = np.divide
    found: Array = choose(layer, "op", table)(a, b)
    return found


def _unary(layer: Layer, values: Values) -> Array:
    import numpy as np

    (x,) = take(layer, values, 1)
    if x.dtype != np.float32:
        raise unknown(layer, f"input {x.dtype}")
    found: Array = choose(layer, "op", {"SQRT": np.sqrt, "RECIP": np.reciprocal})(x)
    return found


def _activation(layer: Layer, values: Values) -> Array:
    """Sigmoid only; it has no alpha and no beta, whatever the attributes say."""
    import numpy as np

    (x,) = take(layer, values, 1)
    demand(layer, type="SIGMOID")
    # Written with tanh, which does not overflow for large negative inputs.
    half = np.float32(0.5)
    found: Array = half * np.tanh(half * x) + half
    return found


def _cast(layer: Layer, values: Values) -> Array:
    (x,) = take(layer, values, 1)
    target = representation(layer, layer.layer.to_type)
    if 1 in (x.dtype.itemsize, target.itemsize):  # FP8 or bool.
        raise unknown(layer, f"a cast from {x.dtype} to {target}")
    return x.astype(target)


def _reduce(layer: Layer, values: Values) -> Array:
    """Mean over the axes whose bits are set."""
    (x,) = take(layer, values, 1)
    demand(layer, op="AVG")
    axes = tuple(axis for axis in range(x.ndim) if layer.layer.axes >> axis & 1)
    found: Array = x.mean(axis=axes, keepdims=layer.layer.keep_dims)
    return found


def _quantize(layer: Layer, values: Values) -> Array:
    """To E4M3: divide by the scale, saturate, round to nearest even, as ONNX Runtime does."""
    import ml_dtypes
    import numpy as np

    x, scale = take(layer, values, 2)
    demand(layer, to_type="FP8")
    _check_per_tensor(layer, scale)
    return np.clip(x / scale, -_E4M3_MAX, _E4M3_MAX).astype(ml_dtypes.float8_e4m3fn)


def _dequantize(layer: Layer, values: Values) -> Array:
    import numpy as np

    codes, scale = take(layer, values, 2)
    if codes.dtype.name != "float8_e4m3fn":
        raise unknown(layer, f"codes of {codes.dtype}")
    representation(layer, layer.layer.to_type)
    _check_per_tensor(layer, scale)
    found: Array = codes.astype(np.float32) * scale
    return found


def _check_per_tensor(layer: Layer, scale: Array) -> None:
    """One scale for the whole tensor: then the axis means nothing, and there are no blocks."""
    if scale.ndim != 0:
        raise unknown(layer, f"a scale of shape {scale.shape}")
    try:
        blocks = layer.layer.block_shape
    except RuntimeError:  # The binding's way to say that none is set.
        return
    raise unknown(layer, f"block_shape = {blocks}")


def _matrix_multiply(layer: Layer, values: Values) -> Array:
    """Batched product; each operand may be transposed."""
    import numpy as np

    a, b = take(layer, values, 2)
    a = a.swapaxes(-1, -2) if _is_transposed(layer, "op0") else a
    b = b.swapaxes(-1, -2) if _is_transposed(layer, "op1") else b
    if a.ndim != b.ndim or a.dtype != np.float32 or b.dtype != np.float32:
        raise unknown(layer, f"operands {a.dtype} {a.shape} and {b.dtype} {b.shape}")
    if b.shape[:-2] == (1,) * (b.ndim - 2):  # A weight: one large product instead of B small ones.
        rows = a.reshape(-1, a.shape[-1]) @ b.reshape(b.shape[-2:])
        return rows.reshape(*a.shape[:-1], b.shape[-1])
    return a @ b


def _is_transposed(layer: Layer, attribute: str) -> bool:
    found: bool = choose(layer, attribute, {"NONE": False, "TRANSPOSE": True})
    return found


ARITHMETIC_RULES = {
    "ACTIVATION": Rule(_activation, frozenset({"alpha", "beta"})),
    "CAST": Rule(_cast, frozenset({"to_type"})),
    "DEQUANTIZE": Rule(_dequantize, frozenset({"axis", "block_shape", "to_type"})),
    "ELEMENTWISE": Rule(_elementwise, frozenset({"op"})),
    "MATRIX_MULTIPLY": Rule(_matrix_multiply, frozenset({"op0", "op1"})),
    "QUANTIZE": Rule(_quantize, frozenset({"axis", "block_shape", "to_type"})),
    "REDUCE": Rule(_reduce, frozenset({"op", "axes", "keep_dims"})),
    "UNARY": Rule(_unary, frozenset({"op"})),
}
