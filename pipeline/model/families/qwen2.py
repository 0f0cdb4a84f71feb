"""Qwen2 and Qwen2.5: q, k and v have biases."""

from __future__ import annotations

from pipeline.model.dense import dense_decoder, window_from_layer
from pipeline.model.read import ConfigKeys
from pipeline.model.spec import ModelSpec

ARCHITECTURE = "Qwen2ForCausalLM"


def read(keys: ConfigKeys) -> ModelSpec:
    """Windows slide only where `use_sliding_window` is true; configs carry their size anyway."""
    keys.require("use_mrope", False)  # Qwen's vision models have it
    window, windowed = window_from_layer(keys)
    return dense_decoder(keys, window=window, windowed=windowed, qkv_bias=True)
