"""TensorRT-RTX engines, compiled ahead of time from an ONNX graph, with no GPU."""

from __future__ import annotations

from pipeline.formats.spec import CompileMemory, FitRule, FormatSpec
from pipeline.formats.trtrtx.onnx_graph import buildable_attention

PACKAGE = "tensorrt-rtx-cu13"
"""The compiler's distribution."""
PLAN_FILE = "model.engine"

PROFILES = 2
"""Optimization profiles of an engine: decode and prefill."""
_SOURCE_BYTES_PER_PROFILE = 28_000_000
"""CUDA source text in a TensorRT-RTX plan, beside the weights: 28 MB for each optimization profile
of SmolLM2 (192 MB with one, 220 MB with two, 163 MB of weights), about the same for Phi-3-mini's
shape. Our measurement with TensorRT-RTX 1.7.1, 2026-11-24."""


SPEC = FormatSpec(
    name="trtrtx",
    runtime="tensorrt-rtx",
    holds=lambda precision: precision.quant_algo is None or precision.onnx is not None,
    kv_cache_dtypes=("bfloat16", "float16"),
    fit=FitRule(
        static=True,
        usable_share=1.0,
        mask_bytes=1,  # computed once for all layers
        overhead_bytes=PROFILES * _SOURCE_BYTES_PER_PROFILE,
    ),
    bound_to="sm",
    runner="tensorrt_rtx",
    substitute="onnxruntime",
    packages=("tensorrt_rtx", "onnx", "onnxruntime", "ml_dtypes"),
    files=("config.json", "tokenizer*", PLAN_FILE),
    serve_args=lambda _limits: (),  # a library, which has no server
    # Anonymous memory: 12.6 GB for 7.52 GB of weights (Mistral-7B's shape), the plan streamed into
    # its file. The weights are mapped beside it (20.2 GB resident), and those pages can be dropped.
    # At least that of SmolLM2 with two profiles, 2026-11-24.
    memory=CompileMemory(
        per_byte=1.7,
        least_bytes=1_500_000_000,
        source="1.7 x the graph's weights, measured 2026-11-25",
    ),
    check_shape=buildable_attention,
)
