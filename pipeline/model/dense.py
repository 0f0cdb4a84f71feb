"""A dense decoder with grouped-query attention and a gated MLP: what most families have."""

from __future__ import annotations

import math

from pipeline.model.config_keys import ConfigKeys
from pipeline.model.rope import read_rope
from pipeline.model.spec import Attention, Layer, Linear, ModelSpec, Norm

_MAX_LAYERS = 4096  # far beyond any model; a typo must not fill the memory
_QWEN_FULL_LAYERS = 28
"""What Transformers (4.57 and 5.14) takes for a Qwen config without `max_window_layers`."""


def dense_decoder(
    keys: ConfigKeys,
    *,
    window: int | None = None,
    first_window_layer: int = 0,
    qkv_bias: bool = False,
    qk_norm: bool = False,
    fused: bool = False,
    kv_heads_default: bool = False,
) -> ModelSpec:
    """Read the keys that these families share.

    Args:
        keys: Of the config.
        window: Attention window of the layers from `first_window_layer` on; None for no window.
        first_window_layer: Layers before it see everything.
        qkv_bias: q, k and v have biases.
        qk_norm: Each head of q and k has a norm.
        fused: q/k/v are stored as `qkv_proj`, gate/up as `gate_up_proj`.
        kv_heads_default: A config without `num_key_value_heads` has as many as query heads; in
            other families Transformers takes a number of its own, so it must be stated.
    """
    # Llama's attention_bias would put one on o_proj as well.
    keys.require("attention_bias", qkv_bias)
    keys.require("mlp_bias", False)
    keys.require("pretraining_tp", 1)
    keys.require("hidden_act", "silu")
    hidden, inner = keys.integer("hidden_size"), keys.integer("intermediate_size")
    count, heads = keys.integer("num_hidden_layers"), keys.integer("num_attention_heads")
    if count > _MAX_LAYERS:
        keys.fault("num_hidden_layers", f"is {count}; it must be <= {_MAX_LAYERS}")
        count = 1
    defaults = (heads,) if kv_heads_default else ()
    kv_heads = keys.integer("num_key_value_heads", *defaults)
    head_dim = keys.integer("head_dim", max(hidden // heads, 1))
    if not keys.faults and heads % kv_heads:
        keys.fault("num_key_value_heads", f"({kv_heads}) does not divide num_attention_heads")
    longest = keys.integer("max_position_embeddings")
    windows = [window if number >= first_window_layer else None for number in range(count)]
    _check_layer_types(keys, windows)
    linears = _linears(hidden, inner, heads * head_dim, kv_heads * head_dim, qkv_bias, fused)
    norms = [
        Norm(module=name, size=hidden) for name in ("input_layernorm", "post_attention_layernorm")
    ]
    if qk_norm:
        norms += [Norm(module=f"self_attn.{name}_norm", size=head_dim) for name in ("q", "k")]
    layers = {
        each: Layer(
            attention=Attention(
                heads=heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                scale=1 / math.sqrt(head_dim),
                window=each,
                qk_norm=qk_norm,
            ),
            linears=linears,
            norms=tuple(norms),
            activation="silu",
        )
        for each in set(windows)
    }
    return ModelSpec(
        architecture=keys.config["architectures"][0],
        hidden_size=hidden,
        vocab_size=keys.integer("vocab_size"),
        max_position_embeddings=longest,
        norm_eps=keys.number("rms_norm_eps"),
        rope=read_rope(keys, head_dim, longest),
        tied=keys.flag("tie_word_embeddings", False),
        layers=tuple(layers[each] for each in windows),
        config=keys.config,
    )


def window_from_layer(keys: ConfigKeys) -> tuple[int | None, int]:
    """Qwen's window, or None, and the first layer that has it."""
    keys.ignore("sliding_window", "max_window_layers")
    if not keys.flag("use_sliding_window", False):
        return None, 0
    window = keys.optional_integer("sliding_window", absent=4096)
    first = keys.take("max_window_layers", _QWEN_FULL_LAYERS)
    if not isinstance(first, int) or isinstance(first, bool) or first < 0:
        keys.fault("max_window_layers", f"is {first!r}; it must be a whole number >= 0")
        first = 0
    return window, first


def _check_layer_types(keys: ConfigKeys, windows: list[int | None]) -> None:
    """`layer_types`, which Transformers 5 writes, must agree with the windows."""
    wanted = ["full_attention" if each is None else "sliding_attention" for each in windows]
    keys.ignore("layer_types")
    stated = keys.config.get("layer_types") or wanted
    if not keys.faults and stated != wanted:
        keys.fault(
            "layer_types",
            f"differs from the windows that the other keys give: {wanted.count('full_attention')} "
            f"layers of full_attention, then {wanted.count('sliding_attention')} of "
            "sliding_attention",
        )


def _linears(
    hidden: int, inner: int, query: int, key: int, qkv_bias: bool, fused: bool
) -> tuple[Linear, ...]:
    """The seven linears; `query` and `key` are the widths of all their heads."""
    sizes = {"q": query, "k": key, "v": key}
    linears = _group("self_attn", "qkv", sizes, hidden, bias=qkv_bias, fused=fused)
    linears.append(Linear(role="o", module="self_attn.o_proj", rows=hidden, columns=query))
    linears += _group("mlp", "gate_up", {"gate": inner, "up": inner}, hidden, fused=fused)
    linears.append(Linear(role="down", module="mlp.down_proj", rows=hidden, columns=inner))
    return tuple(linears)


def _group(
    parent: str,
    name: str,
    sizes: dict[str, int],
    columns: int,
    *,
    bias: bool = False,
    fused: bool,
) -> list[Linear]:
    """Linears that runtimes merge: stored as one module, or as one each."""
    linears, start = [], 0
    for role, rows in sizes.items():
        linears.append(
            Linear(
                role=role,
                module=f"{parent}.{name if fused else role}_proj",
                rows=rows,
                columns=columns,
                first_row=start if fused else 0,
                bias=bias,
                fused=name,
            )
        )
        start += rows
    return linears
