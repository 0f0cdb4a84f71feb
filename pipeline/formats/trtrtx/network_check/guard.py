"""The guard of every build: the decoder's interface, attention layers and cache updates.

It walks the whole parsed network, reads no weight, and takes milliseconds. The interface is stated
here a second time, apart from the code that writes the graph, so that an input which got lost on
the way is found. TensorRT-RTX 1.7.1 parses an Attention node with `nonpad_kv_seqlen` and
`is_causal=1` into a layer without mask and lengths whose causal kind is UPPER_LEFT: it would build,
and attend to the wrong keys in every decode step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.formats.trtrtx.network_check.network import (
    NUMPY_NAMES,
    CheckError,
    Layer,
    layers_of,
)
from pipeline.model.spec import ModelSpec

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

    @classmethod
    def of(
        cls,
        spec: ModelSpec,
        *,
        context: int,
        dtype: Literal["bfloat16", "float16"],
        num_layers: int | None = None,
    ) -> DecoderInterface:
        """That of a model's graph; of so many layers, or of all."""
        attention = spec.layers[0].attention
        return cls(
            num_hidden_layers=spec.num_layers if num_layers is None else num_layers,
            num_key_value_heads=attention.kv_heads,
            context=context,
            head_dim=attention.head_dim,
            rotary_dim=spec.rope.rotary_dim,
            vocab_size=spec.vocab_size,
            dtype=dtype,
        )

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


def guard_network(network: Any, interface: DecoderInterface) -> Mapping[str, int]:
    """Check interface, attention layers and cache updates of a parsed decoder.

    Args:
        network: The `INetworkDefinition` that the compiler will build.
        interface: What the decoder takes and gives.

    Returns:
        How many layers there are of each kind.

    Raises:
        CheckError: Something is missing, left over or different; names the layer and the cause.
    """
    layers = list(layers_of(network))
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    _check_signature("inputs", inputs, interface.inputs(interface.dtype))
    _check_signature("outputs", outputs, interface.outputs(interface.dtype))
    read = {tensor.name for layer in layers for tensor in layer.inputs if tensor is not None}
    if unread := sorted(tensor.name for tensor in inputs if tensor.name not in read):
        raise CheckError(
            f"no layer of the network reads the input {', '.join(unread)}: the parser dropped "
            "what used it, or the graph never did"
        )
    for layer in layers:
        if layer.kind in ("ATTENTION_INPUT", "ATTENTION_OUTPUT"):
            _check_attention(layer)
        elif layer.kind == "ROTARY_EMBEDDING":
            _check_rotary(layer, interface)
    kinds = Counter(layer.kind for layer in layers)
    _check_counts(kinds, interface.num_hidden_layers)
    return dict(sorted(kinds.items()))


def _check_signature(what: str, tensors: list[Any], wanted: Signature) -> None:
    """Demand the names, dtypes and shapes of the decoder graph."""
    got = {
        tensor.name: (
            NUMPY_NAMES.get(tensor.dtype.name, tensor.dtype.name),
            tuple(int(size) for size in tensor.shape),
        )
        for tensor in tensors
    }
    faults = [f"{name} is missing" for name in wanted if name not in got]
    faults += [f"{name} is not part of the decoder" for name in got if name not in wanted]
    faults += [
        f"{name} is {got[name]}, wanted {wanted[name]}"
        for name in wanted
        if name in got and got[name] != wanted[name]
    ]
    if faults:
        raise CheckError(
            f"the network's {what} differ from the decoder's interface: {'; '.join(faults)}; "
            "the graph was written for another shape, or the parser dropped or changed a tensor"
        )


def _check_attention(layer: Layer) -> None:
    """One half of an attention: both halves refer to the same `IAttention`."""
    mask, causal = layer.layer.attention.mask, layer.layer.attention.causal_kind.name
    if mask is None or mask.dtype.name != "BOOL" or causal != "NONE":
        raise CheckError(
            f"{layer} has {'no mask' if mask is None else f'a mask of {mask.dtype.name}'}, wanted "
            f"BOOL, and causal kind {causal}, wanted NONE: the graph gives no mask, or gives "
            "`nonpad_kv_seqlen`, which this parser drops without a word, or `is_causal=1`, which "
            "aligns queries with the first keys of a static cache, not with the last ones. Hide "
            "keys by the bool mask of the decoder graph, key_index <= position_ids"
        )


def _check_rotary(layer: Layer, interface: DecoderInterface) -> None:
    """Half-split pairs, of the leading elements that the model turns."""
    rotary = layer.layer
    turned = rotary.rotary_embedding_dim or interface.head_dim  # 0: all.
    if rotary.interleaved or turned != interface.rotary_dim:
        raise CheckError(
            f"{layer} turns {turned} elements of a head, "
            f"{'neighbours' if rotary.interleaved else 'half-split pairs'}; wanted "
            f"{interface.rotary_dim} in half-split pairs: the parser dropped an attribute, or the "
            "graph was written for another model"
        )


def _check_counts(kinds: Counter[str], num_hidden_layers: int) -> None:
    """One attention, two rotary embeddings and two cache updates per decoder layer."""
    for kind, wanted in (
        ("ATTENTION_INPUT", num_hidden_layers),
        ("ATTENTION_OUTPUT", num_hidden_layers),
        ("KV_CACHE_UPDATE", 2 * num_hidden_layers),
        ("ROTARY_EMBEDDING", 2 * num_hidden_layers),
    ):
        if kinds[kind] != wanted:
            raise CheckError(
                f"the network has {kinds[kind]} {kind} layers, wanted {wanted} for "
                f"{num_hidden_layers} decoder layers: the parser took an Attention, "
                "RotaryEmbedding or TensorScatter node apart, or the graph lacks one"
            )
