"""Llama 2 to 3.3, and SmolLM2, which has its code."""

from __future__ import annotations

from pipeline.model.dense import dense_decoder
from pipeline.model.read import ConfigKeys
from pipeline.model.spec import ModelSpec

ARCHITECTURE = "LlamaForCausalLM"


def read(keys: ConfigKeys) -> ModelSpec:
    """Attention over the whole context."""
    keys.require("sliding_window", None)
    # SmolLM2's conversion: neighbouring pairs, as Transformers does not have them.
    keys.require("rope_interleaved", False)
    keys.ignore("is_llama_config")  # a remark of the same conversion
    return dense_decoder(keys, kv_heads_default=True)
