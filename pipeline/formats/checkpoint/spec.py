"""The unified checkpoint itself: what vLLM, SGLang and TensorRT-LLM >= 1.3 load directly."""

from __future__ import annotations

from pipeline.core.values import Limits
from pipeline.formats.spec import PAGED, FormatSpec
from pipeline.quant.spec import KV_CACHE_DTYPES


def _serve_args(limits: Limits) -> tuple[str, ...]:
    """As vLLM spells them."""
    args: dict[str, object] = {
        "--max-model-len": limits.max_seq_len,
        "--max-num-seqs": limits.max_batch_size,
        "--max-num-batched-tokens": limits.max_num_tokens,
    }
    if KV_CACHE_DTYPES[limits.kv_cache_dtype].quant_algo:
        args |= {"--kv-cache-dtype": limits.kv_cache_dtype}
    return tuple(str(word) for pair in args.items() for word in pair)


SPEC = FormatSpec(
    name="checkpoint",
    runtime="vllm",
    holds=lambda _precision: True,  # its own files name the precision
    kv_cache_dtypes=("fp8", "bfloat16"),
    fit=PAGED,
    bound_to=None,
    runner="vllm",
    substitute="transformers",
    packages=("ml_dtypes",),
    files=("config.json", "tokenizer*", "*.safetensors"),
    serve_args=_serve_args,
    is_checkpoint=True,
)
