"""Ministral 3's language model: YaRN, and queries that grow beyond the original context."""

from __future__ import annotations

from pipeline.model.dense import dense_decoder, read_rope
from pipeline.model.read import ConfigKeys
from pipeline.model.spec import ModelSpec, Rope

ARCHITECTURE = "Ministral3ForCausalLM"


def read(keys: ConfigKeys) -> ModelSpec:
    """The same sliding window in every layer, or none."""
    keys.take("head_dim")  # Transformers would take a number of its own
    window = keys.optional_integer("sliding_window", absent=None)
    return dense_decoder(keys, window=window, ropes=_same_rope)


def _same_rope(keys: ConfigKeys, head_dim: int, max_position_embeddings: int) -> tuple[Rope, Rope]:
    keys.ignore("rope_theta")
    stated = {**keys.section_of("rope_scaling"), **keys.section_of("rope_parameters")}
    if (stated.get("rope_type") or stated.get("type")) != "yarn":  # else Transformers fails
        keys.fault("rope_parameters.rope_type", "is not yarn, which a ministral3 model has")
    sections = (stated, {"rope_theta": keys.config.get("rope_theta")})
    rope = read_rope(keys, sections, head_dim, max_position_embeddings, grows=True)
    return rope, rope
