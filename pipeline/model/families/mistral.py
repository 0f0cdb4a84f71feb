"""Mistral 7B and its successors of the same code."""

from __future__ import annotations

from pipeline.model.dense import dense_decoder
from pipeline.model.read import ConfigKeys
from pipeline.model.spec import ModelSpec

ARCHITECTURE = "MistralForCausalLM"

_WINDOW = 4096
"""What Transformers (4.57 and 5.14) takes for a config without `sliding_window`; null is none."""


def read(keys: ConfigKeys) -> ModelSpec:
    """The same sliding window in every layer, or none."""
    return dense_decoder(keys, window=keys.optional_integer("sliding_window", absent=_WINDOW))
