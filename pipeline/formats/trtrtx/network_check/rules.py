"""What each kind of layer computes, with NumPy, and how tensors are represented.

Values are NumPy arrays. float32, float16 and bfloat16 tensors are all computed in float32 and
*not* rounded to 16 bit: the check asks whether the network means what the graph means, and without
rounding the answer is sharp. FP8 tensors hold E4M3 codes (`ml_dtypes.float8_e4m3fn`).

A rule lists the attributes that it reads. An attribute that the binding offers and no rule reads
may change the meaning, so a layer class with an unlisted one is refused. What a rule says about a
kind is read from TensorRT's documentation, not measured on a GPU.

Shapes: B batch, H query heads, N key/value heads, S sequence of this step, T context, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from pipeline.formats.trtrtx.network_check.network import (
    NUMPY_NAMES,
    CheckError,
    Layer,
    constant_values,
)
from pipeline.quant.spec import FP8_E4M3_MAX

Array = NDArray[Any]

Values = Sequence[Array | None]
"""Input values of a layer; None where an optional input is absent."""
_Evaluate = Callable[[Layer, Values], Array]


@dataclass(frozen=True)
class Rule:
    """How to compute a kind of layer.

    Attributes:
        evaluate: Input values to the one output value.
        attributes: The attributes of this kind's class, beyond those of every layer.
    """

    evaluate: _Evaluate
    attributes: frozenset[str]


RULES: dict[str, Rule] = {}
"""`LayerType` name -> rule."""


def _rule(kind: str, *attributes: str) -> Callable[[_Evaluate], _Evaluate]:
    """Enter a function as the rule of a kind that reads these attributes."""

    def enter(evaluate: _Evaluate) -> _Evaluate:
        RULES[kind] = Rule(evaluate, frozenset(attributes))
        return evaluate

    return enter


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
    if dtype.name not in NUMPY_NAMES:
        raise unknown(layer, f"dtype {dtype.name}")
    return np.dtype("float32" if dtype.name in ("BF16", "HALF") else NUMPY_NAMES[dtype.name])


def require(layer: Layer, **wanted: Any) -> None:
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


@_rule("CONSTANT", "shape", "weights")
def _constant(layer: Layer, values: Values) -> Array:
    take(layer, values, 0)
    found = constant_values(layer)
    return found.astype(representation(layer, layer.outputs[0].dtype), copy=False)


@_rule("SHAPE")
def _shape(layer: Layer, values: Values) -> Array:
    (x,) = take(layer, values, 1)
    return np.array(x.shape, np.int64)


@_rule("SHUFFLE", "first_transpose", "reshape_dims", "second_transpose", "zero_is_placeholder")
def _shuffle(layer: Layer, values: Values) -> Array:
    """Transpose, reshape, transpose; the new shape is an attribute or a second input."""
    shuffle = layer.layer
    x, *reshape = take(layer, values, 1, 2)
    x = x.transpose(_permutation(layer, "first_transpose", x.ndim))
    if reshape:
        target = [int(size) for size in reshape[0]]
    elif shuffle.reshape_dims is not None:
        target = [int(size) for size in shuffle.reshape_dims]
    else:  # No reshape was set.
        target = list(x.shape)
    if shuffle.zero_is_placeholder:
        target = [x.shape[i] if size == 0 else size for i, size in enumerate(target)]
    x = x.reshape(target)
    return x.transpose(_permutation(layer, "second_transpose", x.ndim))


def _permutation(layer: Layer, attribute: str, rank: int) -> list[int]:
    """TensorRT gives permutations of eight axes; those of the tensor must be among themselves."""
    axes = [int(axis) for axis in getattr(layer.layer, attribute)][:rank]
    if sorted(axes) != list(range(rank)):
        raise unknown(layer, f"{attribute} = {axes} for rank {rank}")
    return axes


@_rule("SQUEEZE")
def _squeeze(layer: Layer, values: Values) -> Array:
    x, axes = take(layer, values, 2)
    return np.squeeze(x, tuple(int(axis) for axis in axes))


@_rule("UNSQUEEZE")
def _unsqueeze(layer: Layer, values: Values) -> Array:
    x, axes = take(layer, values, 2)
    return np.expand_dims(x, tuple(int(axis) for axis in axes))


@_rule("CONCATENATION", "axis")
def _concatenation(layer: Layer, values: Values) -> Array:
    return np.concatenate(take(layer, values, len(values)), axis=layer.layer.axis)


@_rule("SLICE", "start", "shape", "stride", "axes", "mode")
def _slice(layer: Layer, values: Values) -> Array:
    """Start, size and stride as attributes, for all axes; nothing beyond the end."""
    (x,) = take(layer, values, 1)
    require(layer, mode="STRICT_BOUNDS", axes=None)
    picks = []
    for start, size, stride, length in zip(
        layer.layer.start, layer.layer.shape, layer.layer.stride, x.shape, strict=True
    ):
        if stride < 1 or start < 0 or start + (size - 1) * stride >= length:
            raise unknown(layer, f"start {start}, size {size}, stride {stride} of {length}")
        picks.append(slice(start, start + (size - 1) * stride + 1, stride))
    return x[tuple(picks)]


@_rule("FILL", "operation", "shape", "alpha", "beta", "is_alpha_beta_int64", "to_type")
def _fill(layer: Layer, values: Values) -> Array:
    """A ramp: shape [1], first value and step come as inputs.

    The attributes shape, alpha and beta are those of the static form, which `take` refuses.
    """
    shape, first, step = take(layer, values, 3)
    require(layer, operation="LINSPACE")
    if shape.shape != (1,) or first.size != 1 or step.size != 1:
        raise unknown(layer, f"a ramp of rank {shape.size}")
    ramp = np.arange(int(shape[0]), dtype=first.dtype) * step.reshape(()) + first.reshape(())
    return ramp.astype(representation(layer, layer.layer.to_type))


@_rule("GATHER", "axis", "mode", "num_elementwise_dims")
def _gather(layer: Layer, values: Values) -> Array:
    rule = choose(layer, "mode", {"DEFAULT": _gather_axis, "ND": _gather_nd})
    found: Array = rule(layer, *take(layer, values, 2))
    return found


def _gather_axis(layer: Layer, data: Array, indices: Array) -> Array:
    require(layer, num_elementwise_dims=0)
    axis = layer.layer.axis
    _check_indices(layer, indices, data.shape[axis])
    return np.take(data, indices, axis)


def _gather_nd(layer: Layer, data: Array, indices: Array) -> Array:
    """One index per row behind one batch axis: data [B, S, ...], indices [B, N, 1]."""
    require(layer, num_elementwise_dims=1)
    if indices.ndim != 3 or indices.shape[-1] != 1:
        raise unknown(layer, f"indices of shape {indices.shape}")
    _check_indices(layer, indices, data.shape[1])
    return np.stack([row[index[:, 0]] for row, index in zip(data, indices, strict=True)])


def _check_indices(layer: Layer, indices: Array, size: int) -> None:
    """TensorRT leaves what happens beyond the end undefined."""
    if indices.size and (indices.min() < 0 or indices.max() >= size):
        raise unknown(layer, f"an index outside 0..{size - 1}")


@_rule("ELEMENTWISE", "op")
def _elementwise(layer: Layer, values: Values) -> Array:
    """Two inputs of equal rank and dtype; axes of size 1 stretch."""
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


@_rule("UNARY", "op")
def _unary(layer: Layer, values: Values) -> Array:
    (x,) = take(layer, values, 1)
    if x.dtype != np.float32:
        raise unknown(layer, f"input {x.dtype}")
    found: Array = choose(layer, "op", {"SQRT": np.sqrt, "RECIP": np.reciprocal})(x)
    return found


@_rule("ACTIVATION", "alpha", "beta")
def _activation(layer: Layer, values: Values) -> Array:
    """Sigmoid only; it has no alpha and no beta, whatever the attributes say."""
    (x,) = take(layer, values, 1)
    require(layer, type="SIGMOID")
    # Written with tanh, which does not overflow for large negative inputs.
    half = np.float32(0.5)
    found: Array = half * np.tanh(half * x) + half
    return found


@_rule("CAST", "to_type")
def _cast(layer: Layer, values: Values) -> Array:
    (x,) = take(layer, values, 1)
    target = representation(layer, layer.layer.to_type)
    if 1 in (x.dtype.itemsize, target.itemsize):  # FP8 or bool.
        raise unknown(layer, f"a cast from {x.dtype} to {target}")
    return x.astype(target)


@_rule("REDUCE", "op", "axes", "keep_dims")
def _reduce(layer: Layer, values: Values) -> Array:
    """Mean over the axes whose bits are set."""
    (x,) = take(layer, values, 1)
    require(layer, op="AVG")
    axes = tuple(axis for axis in range(x.ndim) if layer.layer.axes >> axis & 1)
    found: Array = x.mean(axis=axes, keepdims=layer.layer.keep_dims)
    return found


@_rule("QUANTIZE", "axis", "block_shape", "to_type")
def _quantize(layer: Layer, values: Values) -> Array:
    """To E4M3: divide by the scale, saturate, round to nearest even, as ONNX Runtime does."""
    x, scale = take(layer, values, 2)
    require(layer, to_type="FP8")
    _check_per_tensor(layer, scale)
    return np.clip(x / scale, -FP8_E4M3_MAX, FP8_E4M3_MAX).astype(ml_dtypes.float8_e4m3fn)


@_rule("DEQUANTIZE", "axis", "block_shape", "to_type")
def _dequantize(layer: Layer, values: Values) -> Array:
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


@_rule("MATRIX_MULTIPLY", "op0", "op1")
def _matrix_multiply(layer: Layer, values: Values) -> Array:
    """Batched product; each operand may be transposed."""
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


@_rule("ROTARY_EMBEDDING", "interleaved", "rotary_embedding_dim")
def _rotary_embedding(layer: Layer, values: Values) -> Array:
    """Rotate pairs of x [B, H, S, D] by the table rows [T, R/2] at positions [B, S].

    R, `rotary_embedding_dim`, is how many elements of a head turn, 0 all (TensorRT documentation,
    "Operators", RotaryEmbedding). They are the leading ones, and the others pass unchanged: so the
    CUDA source in a plan of 1.7.1 (read 2026-11-25).
    """
    whole, cos, sin, positions = take(layer, values, 4)
    require(layer, interleaved=False)
    size = whole.shape[-1]
    rotary_dim = layer.layer.rotary_embedding_dim or size
    half = rotary_dim // 2
    if rotary_dim % 2 or not 0 < rotary_dim <= size:
        raise unknown(layer, f"rotary_embedding_dim = {rotary_dim} of {size}")
    if whole.ndim != 4 or cos.shape[1:] != (half,) or sin.shape != cos.shape:
        raise unknown(
            layer,
            f"an input {whole.shape}, rotary_embedding_dim {rotary_dim} and tables {cos.shape} "
            f"and {sin.shape}",
        )
    if positions.min() < 0 or positions.max() >= len(cos):
        raise unknown(layer, f"a position outside 0..{len(cos) - 1}")
    cos, sin = cos[positions][:, None], sin[positions][:, None]  # [B, 1, S, R/2]
    first, second, passed = np.split(whole, [half, rotary_dim], axis=-1)  # pairs: R/2 apart
    return np.concatenate([first * cos - second * sin, first * sin + second * cos, passed], axis=-1)


@_rule("KV_CACHE_UPDATE", "cache_mode", "update_form", "update_lengths")
def _kv_cache_update(layer: Layer, values: Values) -> Array:
    """Write update [B, N, S, D] into a copy of cache [B, N, T, D] from row write_indices[b] on."""
    cache, update, write_indices = take(layer, values, 3)
    require(layer, cache_mode="LINEAR", update_form="PADDED_BHND", update_lengths=None)
    length = update.shape[2]
    if write_indices.min() < 0 or write_indices.max() + length > cache.shape[2]:
        raise unknown(layer, f"a write outside rows 0..{cache.shape[2] - 1}")
    found = cache.copy()
    for row, start in enumerate(write_indices):
        found[row, :, start : start + length] = update[row]
    return found


@_rule("ATTENTION_INPUT", "attention")
def _attention_input(layer: Layer, values: Values) -> Array:
    """Softmax(Q K^T, masked) V, where the bool mask [B, 1, S, T] is true for visible keys.

    `IAttention` does not scale: queries and keys arrive multiplied by the root of the scale
    (TensorRT documentation, "Fused Attention"); true means visible ("Operators", Attention).
    Query heads share key heads in consecutive groups, as in ONNX.
    """
    q, k, v, mask = take(layer, values, 4)
    _check_attention(layer)
    batch, heads, length, size = q.shape
    kv_heads = k.shape[1]
    if mask.dtype != np.bool_ or mask.shape[-1] != k.shape[2] or heads % kv_heads:
        raise unknown(layer, f"a mask {mask.dtype} {mask.shape} on {q.shape} and {k.shape}")
    if not mask.any(axis=-1).all():
        raise unknown(layer, "a mask that hides all keys from a query")
    end = int(np.flatnonzero(mask.any(axis=(0, 1, 2)))[-1]) + 1  # No query sees keys behind it.
    k, v, mask = k[:, :, :end], v[:, :, :end], mask[..., :end]
    grouped = q.reshape(batch, kv_heads, -1, size)  # [B, N, H/N * S, D]
    scores = (grouped @ k.swapaxes(-1, -2)).reshape(batch, heads, length, -1)
    scores = np.where(mask, scores, np.float32(-np.inf))
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    found: Array = weights.reshape(batch, kv_heads, -1, end) @ v
    return found.reshape(batch, heads, length, -1)


def _check_attention(layer: Layer) -> None:
    """The operation between the two boundary layers must be the plain one, on these inputs."""
    attention = layer.layer.attention
    known = {
        *("causal", "causal_kind", "decomposable", "get_input", "get_output", "key_value_form"),
        *("key_value_lengths", "mask", "metadata", "name", "norm_op", "num_inputs"),
        *("normalization_quantize_scale", "normalization_quantize_to_type", "num_outputs"),
        *("num_ranks", "query_form", "query_lengths", "set_input"),
    }
    if extra := {name for name in dir(attention) if not name.startswith("_")} - known:
        raise unknown(layer, f"IAttention.{', '.join(sorted(extra))}")
    # `decomposable` chooses kernels; the quantized type counts only with a scale.
    require(
        Layer(layer.kind, attention),
        causal=False,
        causal_kind="NONE",
        key_value_form="PADDED_BHND",
        key_value_lengths=None,
        norm_op="SOFTMAX",
        normalization_quantize_scale=None,
        query_form="PADDED_BHND",
        query_lengths=None,
    )
    wanted = [attention.get_input(i).name for i in range(3)] + [attention.mask.name]
    if [tensor.name for tensor in layer.inputs] != wanted:
        raise unknown(layer, f"inputs other than query, key, value and mask ({wanted})")


@_rule("ATTENTION_OUTPUT", "attention")
def _attention_output(layer: Layer, values: Values) -> Array:
    """The other boundary: passes on what `_attention_input` computed."""
    (x,) = take(layer, values, 1)
    _check_attention_output(layer)
    return x


def _check_attention_output(layer: Layer) -> None:
    attention = layer.layer.attention
    if attention.num_outputs != 1 or attention.get_output(0).name != layer.outputs[0].name:
        raise unknown(layer, "an output that is not the attention's only one")
