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
    _check_interface(network, layers, interface)
    for layer in layers:
        if layer.kind in ("ATTENTION_INPUT", "ATTENTION_OUTPUT"):
            _check_attention(layer)
        elif layer.kind == "ROTARY_EMBEDDING":
            _check_rotary(layer, interface)
    kinds = Counter(layer.kind for layer in layers)
    _check_counts(kinds, interface.num_hidden_layers)
    return dict(sorted(kinds.items()))


def _check_interface(network: Any, layers: list[Layer], interface: DecoderInterface) -> None:
    """Names, dtypes and shapes; and every input is read by some layer."""
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    check_signature("the network's inputs", _signature(inputs), interface.inputs(interface.dtype))
    check_signature(
        "the network's outputs", _signature(outputs), interface.outputs(interface.dtype)
    )
    read = {tensor.name for layer in layers for tensor in layer.inputs if tensor is not None}
    if unread := sorted(tensor.name for tensor in inputs if tensor.name not in read):
        raise CheckError(
            f"no layer of the network reads the input {', '.join(unread)}: the parser dropped "
            "what used it, or the graph never did"
        )


def _signature(tensors: list[Any]) -> Signature:
    return {
        tensor.name: (
            NUMPY_NAMES.get(tensor.dtype.name, tensor.dtype.name),
            tuple(int(size) for size in tensor.shape),
        )
        for tensor in tensors
    }


def _check_attention(layer: Layer) -> None:
    """One half of an attention: both halves refer to the same `IAttention`."""
    attention = layer.layer.attention
    faults = []
    if attention.mask is None:
        faults.append(
            "has no mask: the graph gives none, or gives `nonpad_kv_seqlen`, which this parser "
            "drops without a word"
        )
    elif attention.mask.dtype.name != "BOOL":
        faults.append(f"has a mask of {attention.mask.dtype.name}, wanted BOOL")
    if attention.causal_kind.name != "NONE":
        faults.append(
            f"has causal kind {attention.causal_kind.name}, wanted NONE: `is_causal=1` aligns "
            "queries with the first keys of a static cache, not with the last ones"
        )
    for lengths in ("key_value_lengths", "query_lengths"):
        if getattr(attention, lengths) is not None:
            faults.append(f"has {lengths}, which the decoder graph never sets")
    if faults:
        raise CheckError(
            f"{layer} {'; '.join(faults)}. "
            "Hide keys by the bool mask of the decoder graph, key_index <= position_ids"
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
