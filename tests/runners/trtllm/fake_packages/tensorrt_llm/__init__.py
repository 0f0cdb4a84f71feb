"""Stands in for TensorRT-LLM 1.2's Python API in tests: the few names that the runner uses.

Every argument that the real classes do not have is an error, as it is there. Fields: `TrtLlmArgs`
and `BaseLlmArgs` in llmapi/llm_args.py, `SamplingParams` in sampling_params.py, 1.2 line.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class SamplingParams:
    """The real one's fields, as far as tests need them."""

    end_id: int | None = None
    pad_id: int | None = None
    max_tokens: int = 32
    top_k: int | None = None
    top_p: float | None = None
    temperature: float | None = None
    return_context_logits: bool = False
    return_generation_logits: bool = False
    return_perf_metrics: bool = False
    ignore_eos: bool = False
