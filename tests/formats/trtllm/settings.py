"""Settings of the compiler for a tiny model, and ways to change one of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pipeline.formats.trtllm.build_tool import Plugins
from pipeline.formats.trtllm.compiler import TrtLlmCompiler

ADA_PLUGINS = Plugins(
    gemm_plugin="disable",
    use_fused_mlp=True,
    use_paged_context_fmha=True,
    multiple_profiles=True,
    tokens_per_block=32,
)
FIELDS: dict[str, Any] = {
    "max_batch_size": 4,
    "max_seq_len": 128,
    "max_num_tokens": 256,
    "opt_num_tokens": None,
    "kv_cache_dtype": "fp8",
    "dtype": "bfloat16",
    "where": "auto",
    "image": "enginesmith-build:1.2.1",
    "timeout_s": 60.0,
    "memory_gib": None,
    "plugins": ADA_PLUGINS,
}


def compiler(plugins: dict[str, Any] | None = None, **fields: Any) -> TrtLlmCompiler:
    """A compiler whose settings differ in some fields or kernel choices."""
    changed = replace(ADA_PLUGINS, **plugins) if plugins else ADA_PLUGINS
    return TrtLlmCompiler(**{**FIELDS, "plugins": changed, **fields})
