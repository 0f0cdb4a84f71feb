"""Gemma 3's language model, alone as the 270M and 1B are: norms around both parts of a layer."""

from __future__ import annotations

import math
from dataclasses import replace

from pipeline.model.dense import dense_decoder, read_rope
from pipeline.model.read import ConfigKeys
from pipeline.model.spec import ModelSpec, Rope

ARCHITECTURE = "Gemma3ForCausalLM"

_NORMS = {
    "attention_in": "input_layernorm",
    "attention_out": "post_attention_layernorm",
    "mlp_in": "pre_feedforward_layernorm",
    "mlp_out": "post_feedforward_layernorm",
}
_PATTERN = 6
"""Every sixth layer sees everything, as Transformers (4.57 and 5.14) takes it unless stated."""


def read(keys: ConfigKeys) -> ModelSpec:
    """Windows and rotary bases by layer, norms that multiply by 1 + weight, a scaled embedding."""
    keys.require("attn_logit_softcapping", None)
    keys.require("final_logit_softcapping", None)
    keys.require("use_bidirectional_attention", False)  # EmbeddingGemma's
    keys.ignore("cache_implementation")  # Transformers' own
    keys.take("head_dim")  # Transformers would take a number of its own, as for these two:
    window, scalar = keys.integer("sliding_window"), keys.number("query_pre_attn_scalar")
    pattern = keys.integer("sliding_window_pattern", keys.take("_sliding_window_pattern", _PATTERN))
    stated = keys.config.get("layer_types")
    kinds = stated if isinstance(stated, list) else []

    def windowed(number: int) -> bool:
        """What `layer_types` says goes before the pattern."""
        if number < len(kinds):
            return bool(kinds[number] == "sliding_attention")
        return (number + 1) % pattern != 0

    spec = dense_decoder(
        keys,
        window=window,
        windowed=windowed,
        ropes=_ropes,
        scale=scalar**-0.5,
        qk_norm=True,
        activation="gelu_tanh",
        norms=_NORMS,
    )
    return replace(
        spec,
        tied=keys.flag("tie_word_embeddings", True),
        norm_offset=1.0,
        embedding_scale=math.sqrt(spec.hidden_size),
    )


def _ropes(keys: ConfigKeys, head_dim: int, max_position_embeddings: int) -> tuple[Rope, Rope]:
    """Transformers 4 has a key for each base and scales the first; 5 has a section for each."""
    sections = ConfigKeys(keys.section_of("rope_parameters"), "rope_parameters.")
    sections.require("rope_theta", None)  # these two stand there if all layers are of one kind
    sections.require("rope_type", "default")
    keys.ignore("rope_theta", "rope_local_base_freq")
    found = []
    for kind, key, theta, scaling in (
        ("full_attention", "rope_theta", 1e6, keys.section_of("rope_scaling")),
        ("sliding_attention", "rope_local_base_freq", 1e4, {}),
    ):
        stated = (scaling, sections.section_of(kind), {"rope_theta": keys.config.get(key)})
        path = f"rope_parameters.{kind}."
        rope = read_rope(keys, stated, head_dim, max_position_embeddings, path=path, theta=theta)
        found.append(rope)
    sections.check_all_known()
    keys.faults += sections.faults
    return found[0], found[1]
