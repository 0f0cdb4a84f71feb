"""Size of the KV cache, for the formats that are built for one."""

from __future__ import annotations

from pipeline.convert.decoder_config import DecoderConfig


def kv_bytes_per_token(config: DecoderConfig, kv_cache_dtype: str) -> int:
    """Keys and values of one token in all layers, bytes."""
    element_bytes = 1 if kv_cache_dtype == "fp8" else 2
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * element_bytes
