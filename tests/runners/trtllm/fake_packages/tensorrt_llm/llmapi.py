"""`tensorrt_llm.llmapi`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class KvCacheConfig:
    """The real one's fields, as far as tests need them."""

    enable_block_reuse: bool = True
    max_tokens: int | None = None
    max_attention_window: list[int] | None = None
    free_gpu_memory_fraction: float | None = None
    tokens_per_block: int = 32
    dtype: str = "auto"
