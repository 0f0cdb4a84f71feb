"""A dense decoder with grouped-query attention and a gated MLP: what most families have."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipeline.model.read import ConfigKeys
from pipeline.model.spec import (
    Attention,
    Layer,
    Linear,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ModelSpec,
    Norm,
    Rope,
    YarnScaling,
    longrope_gain,
)

_MAX_LAYERS = 4096  # far beyond any model; a typo must not fill the memory
_QWEN_FULL_LAYERS = 28
"""What Transformers (4.57 and 5.14) takes for a Qwen config without `max_window_layers`."""
_ACTIVATIONS = {
    "silu": ("hidden_act", "silu"),
    "gelu_tanh": ("hidden_activation", "gelu_pytorch_tanh"),
}
"""Activation -> the key that states it and its name there."""
_NORMS = {"attention_in": "input_layernorm", "mlp_in": "post_attention_layernorm"}


def dense_decoder(
    keys: ConfigKeys,
    *,
    window: int | None = None,
    windowed: Callable[[int], bool] = lambda _number: True,
    ropes: Callable[[ConfigKeys, int, int], tuple[Rope, Rope]] | None = None,
    scale: float | None = None,
    qkv_bias: bool = False,
    qk_norm: bool = False,
    fused: bool = False,
    kv_heads_default: bool = False,
    activation: str = "silu",
    norms: Mapping[str, str] = _NORMS,
) -> ModelSpec:
    """Read the keys that these families share.

    Args:
        keys: Of the config.
        window: Attention window of the layers that are `windowed`; the others see everything.
        windowed: Whether the layer of this number has the window.
        ropes: Reads that of layers that see everything and that of windowed ones; None if equal.
        scale: Multiplies the scores; None for 1 / sqrt(head_dim).
        qkv_bias: q, k and v have biases.
        qk_norm: Each head of q and k has a norm.
        fused: q/k/v are stored as `qkv_proj`, gate/up as `gate_up_proj`.
        kv_heads_default: `num_key_value_heads` may be absent: as many as query heads. In other
            families Transformers takes a number of its own, so it must be stated.
        activation: Of the gate.
        norms: Role -> module of a layer's norms beside those of q and k.
    """
    # Llama's attention_bias would put one on o_proj as well.
    keys.require("attention_bias", qkv_bias)
    keys.require("mlp_bias", False)
    keys.require("pretraining_tp", 1)
    keys.require(*_ACTIVATIONS[activation])
    hidden, inner = keys.integer("hidden_size"), keys.integer("intermediate_size")
    attention = _attention(keys, hidden, scale, qk_norm, kv_heads_default)
    longest = keys.integer("max_position_embeddings")
    kinds = [windowed(number) for number in range(_layer_count(keys))]
    _check_layer_types(keys, [window if kind else None for kind in kinds])
    rope, local_rope = (ropes or _same_rope)(keys, attention.head_dim, longest)
    layer = Layer(
        attention=replace(attention, rope=rope),
        linears=_linears(hidden, inner, attention, qkv_bias, fused),
        norms=_norms(norms, hidden, attention),
        activation=activation,
    )
    near = replace(layer, attention=replace(attention, window=window, rope=local_rope))
    return ModelSpec(
        architecture=keys.config["architectures"][0],
        hidden_size=hidden,
        vocab_size=keys.integer("vocab_size"),
        max_position_embeddings=longest,
        norm_eps=keys.number("rms_norm_eps"),
        tied=keys.flag("tie_word_embeddings", False),
        layers=tuple(near if kind else layer for kind in kinds),
        config=keys.config,
    )


def _layer_count(keys: ConfigKeys) -> int:
    count = keys.integer("num_hidden_layers")
    if count <= _MAX_LAYERS:
        return count
    keys.fault("num_hidden_layers", f"is {count}; it must be <= {_MAX_LAYERS}")
    return 1


def _attention(
    keys: ConfigKeys, hidden: int, scale: float | None, qk_norm: bool, kv_heads_default: bool
) -> Attention:
    """Of all layers, without window and rotation."""
    heads = keys.integer("num_attention_heads")
    kv_heads = keys.integer("num_key_value_heads", *([heads] if kv_heads_default else []))
    head_dim = keys.integer("head_dim", max(hidden // heads, 1))
    if not keys.faults and heads % kv_heads:
        keys.fault("num_key_value_heads", f"({kv_heads}) does not divide num_attention_heads")
    return Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        scale=scale or 1 / math.sqrt(head_dim),
        rope=Rope(theta=1.0, rotary_dim=head_dim),
        qk_norm=qk_norm,
    )


def _norms(modules: Mapping[str, str], hidden: int, attention: Attention) -> tuple[Norm, ...]:
    made = [Norm(role=role, module=module, size=hidden) for role, module in modules.items()]
    for role in "qk" if attention.qk_norm else "":
        module = f"{attention.module}.{role}_norm"
        made.append(Norm(role=role, module=module, size=attention.head_dim))
    return tuple(made)


def window_from_layer(keys: ConfigKeys) -> tuple[int | None, Callable[[int], bool]]:
    """Qwen's window, or None, and whether a layer has it: those from a first one on do."""
    keys.ignore("sliding_window", "max_window_layers")
    if not keys.flag("use_sliding_window", False):
        return None, lambda _number: True
    window = keys.optional_integer("sliding_window", absent=4096)
    first = keys.take("max_window_layers", _QWEN_FULL_LAYERS)
    if not isinstance(first, int) or isinstance(first, bool) or first < 0:
        keys.fault("max_window_layers", f"is {first!r}; it must be a whole number >= 0")
        first = 0
    return window, lambda number: number >= first


def _check_layer_types(keys: ConfigKeys, windows: list[int | None]) -> None:
    """`layer_types`, which Transformers 5 writes, must agree with the windows."""
    wanted = ["full_attention" if each is None else "sliding_attention" for each in windows]
    keys.ignore("layer_types")
    stated = keys.config.get("layer_types") or wanted
    if not keys.faults and stated != wanted:
        full = wanted.count("full_attention")
        layers = f"{full} layers of full_attention, {len(wanted) - full} of sliding_attention"
        message = f"differs from the windows that the other keys give: {layers}"
        keys.fault("layer_types", message)


def _linears(
    hidden: int, inner: int, attention: Attention, qkv_bias: bool, fused: bool
) -> tuple[Linear, ...]:
    """The seven linears."""
    query, key = (n * attention.head_dim for n in (attention.heads, attention.kv_heads))

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


def _same_rope(keys: ConfigKeys, head_dim: int, max_position_embeddings: int) -> tuple[Rope, Rope]:
    """All rope settings, wherever the config states them.

    Transformers 4 has `rope_scaling` beside `rope_theta`; Transformers 5 has all in
    `rope_parameters`, and Phi-3 repeats its factor and its original context at the top level.
    """
    top = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    keys.ignore(*top)
    sections = (
        keys.section_of("rope_scaling"),
        keys.section_of("rope_parameters"),
        {key: keys.config[key] for key in top if key in keys.config},
    )
    rope = read_rope(keys, sections, head_dim, max_position_embeddings)
    return rope, rope


def read_rope(
    keys: ConfigKeys,
    sections: Sequence[Mapping[str, Any]],
    head_dim: int,
    max_position_embeddings: int,
    *,
    path: str = "rope_parameters.",
    theta: float = 10000.0,
    grows: bool = False,
) -> Rope:
    """Read the rope settings in all these sections, faults into `keys`; `theta` if none states it.

    `path` is where Transformers 5 has them; with `grows` YaRN has its factor of queries. A value
    may be stated twice, but not two values.
    """
    found = ConfigKeys(_settings(keys, sections, path), path)
    found.ignore(*_KNOWN)
    theta = found.number("rope_theta", theta)
    partial = found.number("partial_rotary_factor", 1.0)
    kind = found.take("rope_type", "default")
    rotary_dim = int(head_dim * min(partial, 1.0))
    if not (keys.faults or found.faults) and (partial > 1 or rotary_dim < 2 or rotary_dim % 2):
        found.fault("partial_rotary_factor", f"{partial} of {head_dim} is no even size")
    scaling: LinearScaling | Llama3Scaling | LongRopeScaling | YarnScaling | None = None
    if kind == "linear":
        scaling = LinearScaling(factor=found.number("factor"))
    elif kind == "llama3":
        scaling = _llama3_scaling(found)
    elif kind == "yarn":
        scaling = _yarn_scaling(found, max_position_embeddings, grows)
    elif kind == "longrope":
        scaling = _longrope_scaling(found, max_position_embeddings, rotary_dim)
    elif kind != "default":
        found.fault("rope_type", f"{kind!r} is none of default, linear, llama3, longrope, yarn")
    found.check_all_known()
    keys.faults += found.faults
    keys.read |= found.read
    return Rope(theta=theta, rotary_dim=rotary_dim, scaling=scaling)


_KNOWN = ("factor", "max_position_embeddings", "original_max_position_embeddings")
"""Settings that configs carry also where their kind of scaling does not read them."""


def _settings(keys: ConfigKeys, sections: Sequence[Mapping[str, Any]], path: str) -> dict[str, Any]:
    """What the sections state together; Transformers 4 called the `rope_type` `type`."""
    found: dict[str, Any] = {}
    for section in sections:
        for stated, value in section.items():
            key = "rope_type" if stated == "type" else stated
            if value is None:
                continue
            kept = found.setdefault(key, value)
            if kept is not value and kept != value:
                message = f"is stated twice, as {kept!r} and as {value!r}"
                keys.fault(path + key, message)
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


def _yarn_scaling(found: ConfigKeys, max_position_embeddings: int, grows: bool) -> YarnScaling:
    """The edges, and the attention factor as Transformers computes it where none is stated."""
    original = found.integer("original_max_position_embeddings")
    factor = found.number("factor", max_position_embeddings / original)
    keys = ("mscale", "mscale_all_dim", *(["llama_4_scaling_beta"] if grows else []))
    found.ignore(*keys)
    whole, part, *beta = (found.number(key) if found.config.get(key) else 0.0 for key in keys)
    if not (whole and part):
        whole, part = 1.0, 0.0
    gain = _yarn_gain(factor, whole) / _yarn_gain(factor, part)
    return YarnScaling(
        factor=factor,
        beta_fast=found.number("beta_fast", 32.0),
        beta_slow=found.number("beta_slow", 1.0),
        original_max_position_embeddings=original,
        attention_factor=found.number("attention_factor", gain),
        truncate=found.flag("truncate", True),
        query_beta=sum(beta),
    )


def _yarn_gain(factor: float, mscale: float) -> float:
    """0.1 ln(factor) + 1 (arXiv:2309.00071, section 3.4), its first part multiplied by `mscale`."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
