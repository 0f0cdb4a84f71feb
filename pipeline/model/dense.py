"""A dense decoder with grouped-query attention and a gated MLP: what most families have."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pipeline.model.read import ConfigKeys
from pipeline.model.spec import (
    Attention,
    Layer,
    Linear,
    Llama3Scaling,
    LongRopeScaling,
    ModelSpec,
    Norm,
    Rope,
    longrope_gain,
)

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
        kv_heads_default: `num_key_value_heads` may be absent: as many as query heads. In other
            families Transformers takes a number of its own, so it must be stated.
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
    attention = Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        scale=1 / math.sqrt(head_dim),
        qk_norm=qk_norm,
    )
    layers = {each: _layer(replace(attention, window=each), linears, hidden) for each in windows}
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


def _layer(attention: Attention, linears: tuple[Linear, ...], hidden: int) -> Layer:
    sizes = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if attention.qk_norm:
        sizes |= {f"self_attn.{name}_norm": attention.head_dim for name in ("q", "k")}
    norms = tuple(Norm(module=name, size=size) for name, size in sizes.items())
    return Layer(attention=attention, linears=linears, norms=norms, activation="silu")


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
        full = wanted.count("full_attention")
        layers = f"{full} layers of full_attention, then {len(wanted) - full} of sliding_attention"
        message = f"differs from the windows that the other keys give: {layers}"
        keys.fault("layer_types", message)


def _linears(
    hidden: int, inner: int, query: int, key: int, qkv_bias: bool, fused: bool
) -> tuple[Linear, ...]:
    """The seven linears; `query` and `key` are the widths of all their heads."""

    def merge(parent: str, group: str, sizes: dict[str, int], bias: bool) -> Iterator[Linear]:
        """Linears that runtimes merge: stored as one module, or as one each."""
        start = 0
        for role, rows in sizes.items():
            module = f"{parent}.{group if fused else role}_proj"
            linear = Linear(role=role, module=module, rows=rows, columns=hidden, fused=group)
            yield replace(linear, bias=bias, first_row=start)
            start += rows if fused else 0

    return (
        *merge("self_attn", "qkv", {"q": query, "k": key, "v": key}, qkv_bias),
        Linear(role="o", module="self_attn.o_proj", rows=hidden, columns=query),
        *merge("mlp", "gate_up", {"gate": inner, "up": inner}, bias=False),
        Linear(role="down", module="mlp.down_proj", rows=hidden, columns=inner),
    )


def read_rope(keys: ConfigKeys, head_dim: int, max_position_embeddings: int) -> Rope:
    """Read the rope settings in either spelling (Transformers 4 and 5), faults into `keys`."""
    found = ConfigKeys(_settings(keys), "rope_parameters.")
    found.ignore(*_KNOWN)
    theta = found.number("rope_theta", 10000.0)
    partial = found.number("partial_rotary_factor", 1.0)
    kind = found.take("rope_type", "default")
    rotary_dim = int(head_dim * min(partial, 1.0))
    if not (keys.faults or found.faults) and (partial > 1 or rotary_dim < 2 or rotary_dim % 2):
        found.fault("partial_rotary_factor", f"{partial} of {head_dim} is no even size")
    scaling: Llama3Scaling | LongRopeScaling | None = None
    if kind == "llama3":
        scaling = _llama3_scaling(found)
    elif kind == "longrope":
        scaling = _longrope_scaling(found, max_position_embeddings, rotary_dim)
    elif kind != "default":
        found.fault("rope_type", f"{kind!r} is none of default, llama3, longrope")
    found.check_all_known()
    keys.faults += found.faults
    keys.read |= found.read
    return Rope(theta=theta, rotary_dim=rotary_dim, scaling=scaling)


_KNOWN = ("factor", "original_max_position_embeddings")
"""Settings that configs carry also where their kind of scaling does not read them."""


def _settings(keys: ConfigKeys) -> dict[str, Any]:
    """All rope settings, wherever the config states them; twice is fine, two values are not.

    Transformers 4 has `rope_scaling` beside `rope_theta`, and called its `rope_type` `type`;
    Transformers 5 has all in `rope_parameters`, and Phi-3 repeats its factor and its original
    context at the top level, where they take precedence.
    """
    top = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    keys.ignore(*top)
    found: dict[str, Any] = {}
    for section in (
        keys.section_of("rope_scaling"),
        keys.section_of("rope_parameters"),
        {key: keys.config[key] for key in top if key in keys.config},
    ):
        for stated, value in section.items():
            key = "rope_type" if stated == "type" else stated
            if value is None:
                continue
            kept = found.setdefault(key, value)
            if kept is not value and kept != value:
                message = f"is stated twice, as {kept!r} and as {value!r}"
                keys.fault(f"rope_parameters.{key}", message)
                return {}
    return found


def _llama3_scaling(found: ConfigKeys) -> Llama3Scaling:
    scaling = Llama3Scaling(
        factor=found.number("factor"),
        low_freq_factor=found.number("low_freq_factor"),
        high_freq_factor=found.number("high_freq_factor"),
        original_max_position_embeddings=found.integer("original_max_position_embeddings"),
    )
    if not found.faults and not scaling.low_freq_factor < scaling.high_freq_factor:
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        found.fault("low_freq_factor", f"({low}) must be below high_freq_factor ({high})")
    return scaling


def _longrope_scaling(
    found: ConfigKeys, max_position_embeddings: int, rotary_dim: int
) -> LongRopeScaling:
    """The factors, and the attention factor as Transformers computes it where none is stated."""
    original = found.integer("original_max_position_embeddings")
    short, long = found.numbers("short_factor"), found.numbers("long_factor")
    if not found.faults and not len(short) == len(long) == rotary_dim // 2:
        counts = f"{len(short)} short and {len(long)} long factors"
        found.fault("long_factor", f"longrope has {counts} for {rotary_dim // 2} frequencies")
    ratio = found.number("factor", max_position_embeddings / original)
    return LongRopeScaling(
        short_factors=short,
        long_factors=long,
        original_max_position_embeddings=original,
        attention_factor=found.number("attention_factor", longrope_gain(ratio, original)),
    )
