"""Qwen3, dense: no biases, and a norm over each head of q and k before it is rotated."""

from __future__ import annotations

from pipeline.model.dense import dense_decoder, window_from_layer
from pipeline.model.read import ConfigKeys
from pipeline.model.spec import ModelSpec

ARCHITECTURE = "Qwen3ForCausalLM"


def read(keys: ConfigKeys) -> ModelSpec:
    """Windows as in Qwen2."""
    window, windowed = window_from_layer(keys)
    return dense_decoder(keys, window=window, windowed=windowed, qk_norm=True)
