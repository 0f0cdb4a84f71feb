"""Layers that move, cut, join or create values without arithmetic on activations."""

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
from pipeline.formats.trtrtx.network_check.weights import constant_values


def _constant(layer: Layer, values: Values) -> Array:
    take(layer, values, 0)
    found = constant_values(layer)
    return found.astype(representation(layer, layer.outputs[0].dtype), copy=False)


def _shape(layer: Layer, values: Values) -> Array:
    import numpy as np

    (x,) = take(layer, values, 1)
    return np.array(x.shape, np.int64)


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


def _squeeze(layer: Layer, values: Values) -> Array:
    import numpy as np

    x, axes = take(layer, values, 2)
    return np.squeeze(x, tuple(int(axis) for axis in axes))


def _unsqueeze(layer: Layer, values: Values) -> Array:
    import numpy as np

    x, axes = take(layer, values, 2)
    return np.expand_dims(x, tuple(int(axis) for axis in axes))


def _concatenation(layer: Layer, values: Values) -> Array:
    import numpy as np

    return np.concatenate(take(layer, values, len(values)), axis=layer.layer.axis)


def _slice(layer: Layer, values: Values) -> Array:
    """Start, size and stride as attributes, for all axes; nothing beyond the end."""
    (x,) = take(layer, values, 1)
    demand(layer, mode="STRICT_BOUNDS", axes=None)
    picks = []
    for start, size, stride, length in zip(
        layer.layer.start, layer.layer.shape, layer.layer.stride, x.shape, strict=True
    ):
        if stride < 1 or start < 0 or start + (size - 1) * stride >= length:
            raise unknown(layer, f"start {start}, size {size}, stride {stride} of {length}")
        picks.append(slice(start, start + (size - 1) * stride + 1, stride))
    return x[tuple(picks)]


def _fill(layer: Layer, values: Values) -> Array:
    """A ramp: shape [1], first value and step come as inputs."""
    import numpy as np

    shape, first, step = take(layer, values, 3)
    demand(layer, operation="LINSPACE")
    if shape.shape != (1,) or first.size != 1 or step.size != 1:
        raise unknown(layer, f"a ramp of rank {shape.size}")
    ramp = np.arange(int(shape[0]), dtype=first.dtype) * step.reshape(()) + first.reshape(())
    return ramp.astype(representation(layer, layer.layer.to_type))


def _gather(layer: Layer, values: Values) -> Array:
    rule = choose(layer, "mode", {"DEFAULT": _gather_axis, "ND": _gather_nd})
    found: Array = rule(layer, *take(layer, values, 2))
    return found


def _gather_axis(layer: Layer, data: Array, indices: Array) -> Array:
    import numpy as np

    demand(layer, num_elementwise_dims=0)
    axis = layer.layer.axis
    _check_indices(layer, indices, data.shape[axis])
    return np.take(data, indices, axis)


def _gather_nd(layer: Layer, data: Array, indices: Array) -> Array:
    """One index per row behind one batch axis: data [B, S, ...], indices [B, N, 1]."""
    import numpy as np

    demand(layer, num_elementwise_dims=1)
    if indices.ndim != 3 or indices.shape[-1] != 1:
        raise unknown(layer, f"indices of shape {indices.shape}")
    _check_indices(layer, indices, data.shape[1])
    return np.stack([row[index[:, 0]] for row, index in zip(data, indices, strict=True)])


def _check_indices(layer: Layer, indices: Array, size: int) -> None:
    """TensorRT leaves what happens beyond the end undefined."""
    if indices.size and (indices.min() < 0 or indices.max() >= size):
        raise unknown(layer, f"an index outside 0..{size - 1}")


SHAPE_RULES = {
    "CONCATENATION": Rule(_concatenation, frozenset({"axis"})),
    "CONSTANT": Rule(_constant, frozenset({"shape", "weights"})),
    "FILL": Rule(
        _fill,
        # The shape, alpha and beta attributes are those of the static form, which `take` refuses.
        frozenset({"operation", "shape", "alpha", "beta", "is_alpha_beta_int64", "to_type"}),
    ),
    "GATHER": Rule(_gather, frozenset({"axis", "mode", "num_elementwise_dims"})),
    "SHAPE": Rule(_shape),
    "SHUFFLE": Rule(
        _shuffle,
        frozenset({"first_transpose", "reshape_dims", "second_transpose", "zero_is_placeholder"}),
    ),
    "SLICE": Rule(_slice, frozenset({"start", "shape", "stride", "axes", "mode"})),
    "SQUEEZE": Rule(_squeeze),
    "UNSQUEEZE": Rule(_unsqueeze),
}
