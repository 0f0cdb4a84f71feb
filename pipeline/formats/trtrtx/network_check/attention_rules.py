"""Rotary embedding, cache update and attention.

Shapes: B batch, H query heads, N key/value heads, S sequence of this step, T context, D head size.
"""

from __future__ import annotations

from pipeline.formats.trtrtx.network_check.network import Layer
from pipeline.formats.trtrtx.network_check.rules import Array, Rule, Values, demand, take, unknown


def _rotary_embedding(layer: Layer, values: Values) -> Array:
    """Rotate pairs of x [B, H, S, D] by the table rows [T, R/2] at positions [B, S].

    R, `rotary_embedding_dim`, is how many elements of a head turn, 0 all (TensorRT documentation,
    "Operators", RotaryEmbedding). They are the leading ones, and the others pass unchanged: so the
    CUDA source in a plan of 1.7.1 (read 2026-11-25).
    """
    import numpy as np

    whole, cos, sin, positions = take(layer, values, 4)
    demand(layer, interleaved=False)
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


def _kv_cache_update(layer: Layer, values: Values) -> Array:
    """Write update [B, N, S, D] into a copy of cache [B, N, T, D] from row write_indices[b] on."""
    cache, update, write_indices = take(layer, values, 3)
    demand(layer, cache_mode="LINEAR", update_form="PADDED_BHND", update_lengths=None)
    length = update.shape[2]
    if write_indices.min() < 0 or write_indices.max() + length > cache.shape[2]:
        raise unknown(layer, f"a write outside rows 0..{cache.shape[2] - 1}")
    found = cache.copy()
    for row, start in enumerate(write_indices):
        found[row, :, start : start + length] = update[row]
    return found


def _attention_input(layer: Layer, values: Values) -> Array:
    """Softmax(Q K^T, masked) V, where the bool mask [B, 1, S, T] is true for visible keys.

    `IAttention` does not scale: queries and keys arrive multiplied by the root of the scale
    (TensorRT documentation, "Fused Attention"); true means visible ("Operators", Attention).
    Query heads share key heads in consecutive groups, as in ONNX.
    """
    import numpy as np

    q, k, v, mask = take(layer, values, 4)
    _check_attention(layer)
    batch, heads, length, size = q.shape
    kv_heads = k.shape[1]
    if mask.dtype != np.bool_ or mask.shape[-1] != k.shape[2] or heads % kv_heads:
        raise unknown(layer, f"a mask {mask.dtype} {mask.shape} on {q.shape} and {k.shape}")
    if not mask.any(axis=-1).all():
        raise unknown(layer, "a mask that hides all keys from a query")
    end = int(np.flatnonzero(mask.any(axis=(0, 1, 2)))[-1]) + 1  # Nobody sees keys behind it.
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
    demand(
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


def _attention_output(layer: Layer, values: Values) -> Array:
    """The other boundary: passes on what `_attention_input` computed."""
    (x,) = take(layer, values, 1)
    _check_attention_output(layer)
    return x


def _check_attention_output(layer: Layer) -> None:
    attention = layer.layer.attention
    if attention.num_outputs != 1 or attention.get_output(0).name != layer.outputs[0].name:
        raise unknown(layer, "an output that is not the attention's only one")


ATTENTION_RULES = {
    "ATTENTION_INPUT": Rule(_attention_input, frozenset({"attention"})),
    "ATTENTION_OUTPUT": Rule(_attention_output, frozenset({"attention"})),
    "KV_CACHE_UPDATE": Rule(
        _kv_cache_update, frozenset({"cache_mode", "update_form", "update_lengths"})
    ),
    "ROTARY_EMBEDDING": Rule(_rotary_embedding, frozenset({"interleaved", "rotary_embedding_dim"})),
}
