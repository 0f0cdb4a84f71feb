"""The shape of a model: the numbers of its `config.json` that sizes and ceilings follow from.

A recipe names a shape from `recipes/shapes/`, so that a plan needs no download. The fetched
`config.json` is compared with it later; a difference is a recipe fault.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from pipeline.core.errors import Fault
from pipeline.core.settings import STRICT

Architecture = Literal[
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Phi3ForCausalLM"
]
RopeType = Literal["default", "llama3", "longrope"]
"""Rotary tables that the converters write. `su` was LongRoPE's name before its settings had their
present form; `yarn`, `linear` and `dynamic` scale in ways of their own."""

_MISTRAL_WINDOW = 4096
_QWEN2_FULL_LAYERS = 28
"""What Transformers (4.57 and 5.14) takes for a Mistral config without `sliding_window`, and for a
Qwen2 config without `max_window_layers`."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelShape:
    """A dense decoder with grouped-query attention and a gated MLP.

    Attributes:
        architecture: `architectures[0]` of config.json.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the MLP.
        num_hidden_layers: Decoder layers.
        num_attention_heads: Query heads.
        num_key_value_heads: Key and value heads; a divisor of the query heads.
        head_dim: Size of one head.
        vocab_size: Rows of the embedding.
        max_position_embeddings: Longest context the model was trained for, in tokens.
        rope_theta: Base of the rotary embedding.
        rope_type: `default`, or the scaling that changes the rotary table.
        original_max_position_embeddings: For `longrope`: context up to which its short factors
            hold, in tokens; longer contexts use another table. None for other types.
        tie_word_embeddings: lm_head is the embedding, stored once.
        attention_bias: q, k and v have biases (Qwen2).
        sliding_window: Keys further back than this are not attended to; None for all.
    """

    architecture: Architecture
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt
    vocab_size: PositiveInt
    max_position_embeddings: PositiveInt
    rope_theta: PositiveFloat
    rope_type: RopeType = "default"
    original_max_position_embeddings: PositiveInt | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    sliding_window: PositiveInt | None = None

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )

    @property
    def linear_params_per_layer(self) -> int:
        """Weights of the seven linears of one layer, biases not counted."""
        query = self.num_attention_heads * self.head_dim
        key_value = self.num_key_value_heads * self.head_dim
        attention = self.hidden_size * (query + 2 * key_value) + query * self.hidden_size
        return attention + 3 * self.hidden_size * self.intermediate_size

    @property
    def linear_params(self) -> int:
        """Weights of all layers' linears: what FP8 halves."""
        return self.num_hidden_layers * self.linear_params_per_layer

    @property
    def embedding_params(self) -> int:
        """Weights of the token embedding; lm_head has as many, or shares them when tied."""
        return self.vocab_size * self.hidden_size

    @property
    def other_params(self) -> int:
        """Norms and biases: two norms a layer, one at the end, q/k/v biases where there are any."""
        norms = (2 * self.num_hidden_layers + 1) * self.hidden_size
        bias_width = (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim
        return norms + (self.num_hidden_layers * bias_width if self.attention_bias else 0)

    @property
    def params(self) -> int:
        """All parameters, a tied embedding counted once."""
        heads = 1 if self.tie_word_embeddings else 2
        return self.linear_params + heads * self.embedding_params + self.other_params

    def kv_bytes_per_token(self, bytes_per_element: int) -> int:
        """Cache that one token of one sequence takes: keys and values of all layers."""
        width = self.num_key_value_heads * self.head_dim
        return 2 * self.num_hidden_layers * width * bytes_per_element


def shape_of_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `ModelShape` as a Hugging Face `config.json` states them.

    Knows both spellings of rope settings: `rope_theta`/`rope_scaling` at the top level
    (Transformers 4) and `rope_parameters` (Transformers 5). A field that the config lacks, and that
    no class of Transformers has a default for, is None.
    """
    rope = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    heads = config.get("num_attention_heads")
    architecture = (config.get("architectures") or [None])[0]
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    original = rope.get("original_max_position_embeddings") or config.get(
        "original_max_position_embeddings"
    )
    return {
        "architecture": architecture,
        "hidden_size": config.get("hidden_size"),
        "intermediate_size": config.get("intermediate_size"),
        "num_hidden_layers": config.get("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or (config.get("hidden_size") or 0) // (heads or 1),
        "vocab_size": config.get("vocab_size"),
        "max_position_embeddings": config.get("max_position_embeddings"),
        "rope_theta": float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        "rope_type": rope_type,
        "original_max_position_embeddings": original if rope_type == "longrope" else None,
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        "attention_bias": bool(config.get("attention_bias", architecture == "Qwen2ForCausalLM")),
        "sliding_window": _sliding_window(config, architecture),
    }


def _sliding_window(config: Mapping[str, Any], architecture: str | None) -> int | None:
    """The window of a config; None where no layer has one.

    Qwen2 slides only where `use_sliding_window` is true, and only from layer `max_window_layers`
    on: configs that leave it off still carry the number. A mixture of layers counts as sliding; the
    converters refuse it.
    """
    is_qwen2 = architecture == "Qwen2ForCausalLM"
    if not config.get("use_sliding_window", not is_qwen2):
        return None
    if is_qwen2:
        full_layers = config.get("max_window_layers", _QWEN2_FULL_LAYERS)
        if full_layers >= (config.get("num_hidden_layers") or 0):
            return None
    default = _MISTRAL_WINDOW if architecture == "MistralForCausalLM" else None
    window: int | None = config.get("sliding_window", default)
    return window


def shape_faults(shape: ModelShape, config: Mapping[str, Any]) -> list[Fault]:
    """Where a fetched `config.json` differs from the shape that the recipe planned with."""
    found = shape_of_config(config)
    wanted = dataclasses.asdict(shape)
    return [
        Fault(
            f"shape.{name}",
            f"the recipe plans with {wanted[name]}, the fetched config.json says {found[name]}; "
            "correct recipes/shapes or choose the right source",
        )
        for name in wanted
        if wanted[name] != found[name]
    ]
