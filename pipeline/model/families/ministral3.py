"""Ministral 3's language model: YaRN, and queries that grow beyond the original context."""

from __future__ import annotations

from dataclasses import replace

from pipeline.model.dense import dense_decoder, read_rope
from pipeline.model.read import ConfigKeys
from pipeline.model.spec import ModelSpec, QueryScaling, Rope, YarnScaling

ARCHITECTURE = "Ministral3ForCausalLM"

_BETA = "llama_4_scaling_beta"


def read(keys: ConfigKeys) -> ModelSpec:
    """The same sliding window in every layer, or none."""
    keys.take("head_dim")  # Transformers would take a number of its own
    stated = {**keys.section_of("rope_scaling"), **keys.section_of("rope_parameters")}
    own = ConfigKeys(stated, "rope_parameters.")
    beta = own.number(_BETA) if stated.get(_BETA) != 0 else 0.0
    keys.ignore("rope_theta")

    def same_rope(keys: ConfigKeys, head_dim: int, longest: int) -> tuple[Rope, Rope]:
        further = {_BETA, "max_position_embeddings"}  # the latter is only repeated
        sections = (
            {key: value for key, value in stated.items() if key not in further},
            {"rope_theta": keys.config.get("rope_theta")},
        )
        rope = read_rope(keys, sections, head_dim, longest)
        return rope, rope

    window = keys.optional_integer("sliding_window", absent=None)
    spec = dense_decoder(keys, window=window, ropes=same_rope)
    yarn = spec.layers[0].attention.rope.scaling
    if not isinstance(yarn, YarnScaling):
        own.fault("rope_type", "is not yarn, which a ministral3 model has")
    keys.faults += own.faults
    if beta == 0 or not isinstance(yarn, YarnScaling):
        return spec
    original = yarn.original_max_position_embeddings
    scaling = QueryScaling(beta=beta, original_max_position_embeddings=original)
    attention = replace(spec.layers[0].attention, query_scaling=scaling)
    layer = replace(spec.layers[0], attention=attention)
    return replace(spec, layers=(layer,) * spec.num_layers)
