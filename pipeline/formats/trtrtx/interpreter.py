"""Computes what a parsed TensorRT-RTX network says, with NumPy: a rule for each kind of layer.

16-bit tensors are computed in float32 and *not* rounded: the check asks whether the network means
what the graph means, and without rounding the answer is sharp. FP8 tensors hold E4M3 codes.

A rule lists the attributes that it reads, and the only values that it covers of some. A layer class
with an attribute that no rule reads may mean something else, and is refused like an unknown kind.
Rules follow TensorRT's documentation; none was measured on a GPU.

Shapes: B batch, H query heads, N key/value heads, S sequence of this step, T context, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from graphlib import TopologicalSorter
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from pipeline.formats.trtrtx.network import (
    NUMPY_NAMES,
    CheckError,
    Layer,
    constant_values,
    layers_of,
)
from pipeline.quant.spec import FP8_E4M3_MAX

Array = NDArray[Any]
Observe = Callable[[str, Array], Array]
"""Gets the name and value of a tensor as it is computed; returns the value to go on with."""
_Evaluate = Callable[..., Array]

RULES: dict[str, tuple[_Evaluate, frozenset[str], Mapping[str, Any]]] = {}
"""Kind -> (layer, values of its inputs) -> its one output value; the attributes of the kind's class
that it reads, beyond those of every layer; and attribute -> the only value that it covers."""


def _rule(kind: str, *attributes: str, **only: Any) -> Callable[[_Evaluate], _Evaluate]:
    def enter(evaluate: _Evaluate) -> _Evaluate:
        RULES[kind] = (evaluate, frozenset({*attributes, *only}), only)
        return evaluate

    return enter


def unknown(layer: Layer, what: str) -> CheckError:
    """It may mean something which no rule covers."""
    advice = "write the graph without it, or add a rule to pipeline/formats/trtrtx/interpreter.py"
    return CheckError(f"{layer}: {what} is unknown to the network check; {advice}")


def representation(layer: Layer, dtype: Any) -> np.dtype[Any]:
    """NumPy dtype of the arrays that stand for a tensor of TensorRT's `dtype`."""
    if dtype.name not in NUMPY_NAMES:
        raise unknown(layer, f"dtype {dtype.name}")
    return np.dtype("float32" if dtype.name in ("BF16", "HALF") else NUMPY_NAMES[dtype.name])


def _require(layer: Layer, attributes: Any, only: Mapping[str, Any]) -> None:
    for name, value in only.items():
        got = getattr(attributes, name)
        got = getattr(got, "name", got)
        if got != value:
            raise unknown(layer, f"{name} = {got}")


def _choose(layer: Layer, attribute: str, table: dict[str, Any]) -> Any:
    got = getattr(layer.layer, attribute)
    if got.name not in table:
        raise unknown(layer, f"{attribute} = {got.name}")
    return table[got.name]


_ELEMENTWISE = {
    "SUM": np.add,
    "SUB": np.subtract,
    "PROD": np.multiply,
    "DIV": np.divide,  # Of integers it would be float64, which no network states.
    "MAX": np.maximum,
    "FLOOR_DIV": np.floor_divide,
    "EQUAL": np.equal,
    "LESS": np.less,
    "GREATER": np.greater,
    "AND": np.logical_and,
    "OR": np.logical_or,
}


@_rule("CONSTANT", "shape", "weights")
def _constant(layer: Layer) -> Array:
    found = constant_values(layer)
    return found.astype(representation(layer, layer.outputs[0].dtype), copy=False)


_rule("SHAPE")(lambda _layer, x: np.array(x.shape, np.int64))
_rule("SQUEEZE")(lambda _layer, x, axes: np.squeeze(x, tuple(axes.tolist())))
_rule("UNSQUEEZE")(lambda _layer, x, axes: np.expand_dims(x, tuple(axes.tolist())))
_rule("CONCATENATION", "axis")(lambda layer, *all_: np.concatenate(all_, axis=layer.layer.axis))
_rule("UNARY", op="SQRT")(lambda _layer, x: np.sqrt(x))
_rule("ELEMENTWISE", "op")(lambda layer, a, b: _choose(layer, "op", _ELEMENTWISE)(a, b))


@_rule("SHUFFLE", "first_transpose", "reshape_dims", "second_transpose", "zero_is_placeholder")
def _shuffle(layer: Layer, x: Array, shape: Array | None = None) -> Array:
    """The new shape is an attribute or a second input; permutations are of eight axes."""
    shuffle = layer.layer
    x = x.transpose(list(shuffle.first_transpose)[: x.ndim])
    wanted = shuffle.reshape_dims if shape is None else shape
    target = [int(size) for size in (x.shape if wanted is None else wanted)]  # None: as it is
    if shuffle.zero_is_placeholder:
        target = [x.shape[i] if size == 0 else size for i, size in enumerate(target)]
    x = x.reshape(target)
    return x.transpose(list(shuffle.second_transpose)[: x.ndim])


@_rule("SLICE", "start", "shape", "stride", axes=None, mode="STRICT_BOUNDS")
def _slice(layer: Layer, x: Array) -> Array:
    numbers = zip(layer.layer.start, layer.layer.shape, layer.layer.stride, strict=True)
    return x[tuple(slice(start, start + size * stride, stride) for start, size, stride in numbers)]


@_rule("FILL", "shape", "alpha", "beta", "is_alpha_beta_int64", "to_type", operation="LINSPACE")
def _fill(layer: Layer, shape: Array, first: Array, step: Array) -> Array:
    """A ramp; the attributes shape, alpha and beta are of the static form, which has no inputs."""
    (count,) = shape
    ramp = np.arange(count, dtype=first.dtype) * step.reshape(()) + first.reshape(())
    return ramp.astype(representation(layer, layer.layer.to_type))


@_rule("GATHER", "axis", "mode", "num_elementwise_dims")
def _gather(layer: Layer, data: Array, indices: Array) -> Array:
    """Along an axis; or one index for a row, of data [B, S, ..] by indices [B, N, 1]."""
    by_row = _choose(layer, "mode", {"DEFAULT": False, "ND": True})
    _require(layer, layer.layer, {"num_elementwise_dims": int(by_row)})
    if by_row:
        return data[np.arange(len(data))[:, None], indices.squeeze(-1)]
    return np.take(data, indices, layer.layer.axis)


def _sigmoid(x: Array) -> Array:
    """With tanh, which does not overflow."""
    half = np.float32(0.5)
    found: Array = half * np.tanh(half * x) + half
    return found


def _gelu_tanh(x: Array) -> Array:
    """GELU by its tanh approximation (TensorRT documentation, `ActivationType`)."""
    cubic = np.float32(0.044715) * x * x * x
    half, root = np.float32(0.5), np.float32((2 / np.pi) ** 0.5)
    found: Array = half * x * (1 + np.tanh(root * (x + cubic)))
    return found


@_rule("ACTIVATION", "alpha", "beta", "type")
def _activation(layer: Layer, x: Array) -> Array:
    """Neither of the two has an alpha or a beta."""
    found: Array = _choose(layer, "type", {"SIGMOID": _sigmoid, "GELU_TANH": _gelu_tanh})(x)
    return found


@_rule("CAST", "to_type")
def _cast(layer: Layer, x: Array) -> Array:
    target = representation(layer, layer.layer.to_type)
    if 1 in (x.dtype.itemsize, target.itemsize):  # FP8 or bool.
        raise unknown(layer, f"a cast from {x.dtype} to {target}")
    return x.astype(target)


@_rule("REDUCE", "axes", "keep_dims", op="AVG")
def _reduce(layer: Layer, x: Array) -> Array:
    axes = tuple(axis for axis in range(x.ndim) if layer.layer.axes >> axis & 1)
    found: Array = x.mean(axis=axes, keepdims=layer.layer.keep_dims)
    return found


@_rule("QUANTIZE", "axis", "block_shape", to_type="FP8")
def _quantize(layer: Layer, x: Array, scale: Array) -> Array:
    """As ONNX Runtime: saturate, round to nearest even."""
    _check_per_tensor(layer, scale)
    return np.clip(x / scale, -FP8_E4M3_MAX, FP8_E4M3_MAX).astype(ml_dtypes.float8_e4m3fn)


@_rule("DEQUANTIZE", "axis", "block_shape", "to_type")
def _dequantize(layer: Layer, codes: Array, scale: Array) -> Array:
    """One scale for all; of INT4 one for each run of columns, whose length the shapes tell."""
    if codes.dtype.name == "int4" and scale.ndim == 2 and layer.layer.axis == 1:
        columns = codes.shape[1] // scale.shape[1]
        grouped: Array = codes.astype(np.float32) * np.repeat(scale, columns, axis=1)
        return grouped
    if codes.dtype.name != "float8_e4m3fn":
        raise unknown(layer, f"codes of {codes.dtype}")
    _check_per_tensor(layer, scale)
    found: Array = codes.astype(np.float32) * scale
    return found


def _check_per_tensor(layer: Layer, scale: Array) -> None:
    """One scale for the whole tensor: the axis means nothing, and there are no blocks."""
    if scale.ndim != 0:
        raise unknown(layer, f"a scale of shape {scale.shape}")
    try:
        blocks = layer.layer.block_shape
    except RuntimeError:  # The binding's way to say that none is set.
        return
    raise unknown(layer, f"block_shape = {blocks}")


@_rule("MATRIX_MULTIPLY", "op0", "op1")
def _matrix_multiply(layer: Layer, a: Array, b: Array) -> Array:
    transposed = {"NONE": False, "TRANSPOSE": True}
    a = a.swapaxes(-1, -2) if _choose(layer, "op0", transposed) else a
    b = b.swapaxes(-1, -2) if _choose(layer, "op1", transposed) else b
    if b.shape[:-2] == (1,) * (b.ndim - 2):  # A weight: one large product instead of B small ones.
        rows = a.reshape(-1, a.shape[-1]) @ b.reshape(b.shape[-2:])
        return rows.reshape(*a.shape[:-1], b.shape[-1])
    return a @ b


@_rule("ROTARY_EMBEDDING", "rotary_embedding_dim", interleaved=False)
def _rotary_embedding(layer: Layer, whole: Array, cos: Array, sin: Array, at: Array) -> Array:
    """Rotate pairs of x [B, H, S, D] by the table rows [T, R/2] at positions [B, S].

    R, `rotary_embedding_dim`, is how many elements of a head turn, 0 all (TensorRT documentation,
    "Operators"): the leading ones; the others pass (CUDA source in a plan of 1.7.1, 2026-11-25).
    """
    rotary_dim = layer.layer.rotary_embedding_dim or whole.shape[-1]
    cos, sin = cos[at][:, None], sin[at][:, None]  # [B, 1, S, R/2]
    first, second, passed = np.split(whole, [rotary_dim // 2, rotary_dim], axis=-1)
    return np.concatenate([first * cos - second * sin, first * sin + second * cos, passed], axis=-1)


@_rule("KV_CACHE_UPDATE", cache_mode="LINEAR", update_form="PADDED_BHND", update_lengths=None)
def _kv_cache_update(_layer: Layer, cache: Array, update: Array, write_indices: Array) -> Array:
    """Write update [B, N, S, D] into a copy of cache [B, N, T, D] from row write_indices[b] on."""
    found = cache.copy()
    for row, start in enumerate(write_indices):
        found[row, :, start : start + update.shape[2]] = update[row]
    return found


_PLAIN_ATTENTION: Mapping[str, Any] = {
    "causal": False,
    "causal_kind": "NONE",
    "key_value_form": "PADDED_BHND",
    "key_value_lengths": None,
    "norm_op": "SOFTMAX",
    "normalization_quantize_scale": None,
    "num_outputs": 1,
    "query_form": "PADDED_BHND",
    "query_lengths": None,
}
_ATTENTION_NAMES = {
    # `decomposable` chooses kernels; the quantized type counts only with a scale.
    *("decomposable", "get_input", "get_output", "mask", "metadata", "name", "num_inputs"),
    *("normalization_quantize_to_type", "num_ranks", "set_input"),
    *_PLAIN_ATTENTION,
}


@_rule("ATTENTION_INPUT", "attention")
def _attention_input(layer: Layer, q: Array, k: Array, v: Array, mask: Array) -> Array:
    """Softmax(Q K^T, masked) V, where the bool mask [B, 1, S, T] is true for visible keys.

    `IAttention` does not scale: queries and keys arrive multiplied by the root of the scale
    (TensorRT documentation, "Fused Attention"); true means visible ("Operators", Attention).
    Query heads share key heads in consecutive groups, as in ONNX.
    """
    attention = layer.layer.attention
    if extra := {name for name in dir(attention) if name[0] != "_"} - _ATTENTION_NAMES:
        raise unknown(layer, f"IAttention.{', '.join(sorted(extra))}")
    _require(layer, attention, _PLAIN_ATTENTION)
    wanted = [attention.get_input(i).name for i in range(3)] + [attention.mask.name]
    if [tensor.name for tensor in layer.inputs] != wanted:
        raise unknown(layer, f"inputs other than query, key, value and mask ({wanted})")
    if not mask.any(axis=-1).all():
        raise unknown(layer, "a mask that hides all keys from a query")
    batch, heads, length, size = q.shape
    grouped = q.reshape(batch, k.shape[1], -1, size)  # [B, N, H/N * S, D]
    scores = (grouped @ k.swapaxes(-1, -2)).reshape(batch, heads, length, -1)
    scores = np.where(mask, scores, np.float32(-np.inf))
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    found: Array = weights.reshape(batch, k.shape[1], -1, k.shape[2]) @ v
    return found.reshape(batch, heads, length, -1)


@_rule("ATTENTION_OUTPUT", "attention")
def _attention_output(layer: Layer, x: Array) -> Array:
    if layer.layer.attention.get_output(0).name != layer.outputs[0].name:
        raise unknown(layer, "an output that is not the attention's only one")
    return x


class NetworkInterpreter:
    """A network whose layers are known and sorted; what depends on constants only is computed.

    `constants` are the CONSTANT layers by name: that of the ONNX initializer where there is one;
    `quantized` what QUANTIZE layers read.
    """

    def __init__(self, network: Any) -> None:
        layers = list(layers_of(network))
        for layer in layers:
            _check_known(layer)
        self._inputs = [network.get_input(i).name for i in range(network.num_inputs)]
        self._outputs = [network.get_output(i).name for i in range(network.num_outputs)]
        self.constants = {str(one.layer.name): one for one in layers if one.kind == "CONSTANT"}
        self.quantized = {layer.inputs[0].name for layer in layers if layer.kind == "QUANTIZE"}
        self._fixed: dict[str, Array] = {}
        self._layers = []
        varying = set(self._inputs)
        for layer in _in_order(layers, varying):
            if varying.isdisjoint(tensor.name for tensor in layer.inputs):
                self._fixed[layer.outputs[0].name] = _evaluate(layer, self._fixed)
            else:
                varying.add(layer.outputs[0].name)
                self._layers.append(layer)
        read = {tensor.name for layer in self._layers for tensor in layer.inputs}
        self._fixed = {name: value for name, value in self._fixed.items() if name in read}

    def run(self, feeds: Mapping[str, Array], observe: Observe | None = None) -> dict[str, Array]:
        """Outputs from inputs, 16-bit ones as float32; `observe` gets what depends on an input."""
        values = {**self._fixed, **{name: feeds[name] for name in self._inputs}}
        for layer in self._layers:
            name = layer.outputs[0].name
            value = _evaluate(layer, values)
            values[name] = observe(name, value) if observe else value
        return {name: values[name] for name in self._outputs}


def _check_known(layer: Layer) -> None:
    """There is a rule for the kind, and it reads all attributes that the kind's class has."""
    import tensorrt_rtx as trt

    if layer.kind not in RULES:
        raise unknown(layer, f"the kind {layer.kind}")
    offered = {name for name in dir(type(layer.layer)) if not name.startswith("_")}
    if extra := offered - set(dir(trt.ILayer)) - RULES[layer.kind][1]:
        raise unknown(layer, f"the attribute {', '.join(sorted(extra))}")
    if len(layer.outputs) != 1 or None in layer.inputs:
        raise unknown(layer, f"a form with {len(layer.outputs)} outputs or an absent input")


def _in_order(layers: list[Layer], inputs: set[str]) -> list[Layer]:
    made_by = {layer.outputs[0].name: layer for layer in layers}
    reads = {name: {tensor.name for tensor in made_by[name].inputs} for name in made_by}
    if len(made_by) != len(layers) or made_by.keys() & inputs:
        raise CheckError("two tensors of the network have one name")
    if lost := set().union(*reads.values()) - made_by.keys() - inputs:
        raise CheckError(f"no layer of the network makes the tensor {', '.join(sorted(lost))}")
    order = TopologicalSorter(reads).static_order()
    return [made_by[name] for name in order if name in made_by]


def _evaluate(layer: Layer, values: Mapping[str, Array]) -> Array:
    """Compute a layer and hold the result against dtype and shape that the network states."""
    evaluate, _, only = RULES[layer.kind]
    _require(layer, layer.layer, only)
    try:
        value = evaluate(layer, *(values[tensor.name] for tensor in layer.inputs))
    except (IndexError, TypeError, ValueError) as error:
        raise unknown(layer, f"a form that NumPy refuses ({error})") from error
    tensor = layer.outputs[0]
    shape = tuple(int(size) for size in tensor.shape)
    fits = len(shape) == value.ndim and all(
        stated in (-1, size) for stated, size in zip(shape, value.shape, strict=False)
    )
    if not fits or value.dtype != representation(layer, tensor.dtype):
        raise CheckError(
            f"{layer} should give {tensor.dtype.name} {shape}, the network check computed "
            f"{value.dtype} {value.shape}: it does not understand this layer"
        )
    return value
