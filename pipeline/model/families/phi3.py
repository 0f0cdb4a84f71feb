"""Phi-3, Phi-3.5 and Phi-4-mini: q/k/v are stored as one tensor, and gate/up as another."""

from __future__ import annotations

from pipeline.model.dense import dense_decoder
from pipeline.model.read import ConfigKeys
from pipeline.model.spec import ModelSpec

ARCHITECTURE = "Phi3ForCausalLM"


def read(keys: ConfigKeys) -> ModelSpec:
    """The same sliding window in every layer, or none."""
    keys.require("lm_head_bias", False)
    # Phi-4-mini's config carries these two, always as 1.
    keys.require("full_attn_mod", 1)
    keys.require("interpolate_factor", 1)
    keys.ignore("embd_pdrop", "resid_pdrop")
    window = keys.optional_integer("sliding_window", absent=None)
    return dense_decoder(keys, window=window, fused=True, kv_heads_default=True)
