"""How many bytes a model takes: on disk, in the engine, in the KV cache, and while it is built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.core.hardware import GIB
from pipeline.core.values import Format
from pipeline.plan.linears import linear_modules, select
from pipeline.plan.request import PlanRequest

KV_BYTES_PER_ELEMENT = {"fp8": 1, "bfloat16": 2, "float16": 2}
"""Allowed `kv_cache_dtype` -> bytes of one element."""

_SCALE_BYTES = 4
"""Scales are float32 scalars: two for each FP8 linear (weight, input), two for a layer (k, v)."""

_RTX_SOURCE_BYTES_PER_PROFILE = 28_000_000
"""CUDA source text in a TensorRT-RTX plan, beside the weights: 28 MB for each optimization profile
of SmolLM2 (192 MB with one, 220 MB with two, 163 MB of weights), about the same for Phi-3-mini's
shape. Our measurement with TensorRT-RTX 1.7.1, 2026-11-24."""
_RTX_PROFILES = 2  # prefill and decode

_QUANTIZE_BASE_BYTES = 3_200_000_000
"""Libraries, calibration activations and GGUF loading: what the model does not explain of the 3.9
GB peak RSS of quantizing SmolLM2 on a CPU (ModelOpt 0.47; our measurement, 2026-11-24)."""
_KEPT_TOKENS = 4096
_PER_POSITION_BYTES = 12
"""What acceptance keeps of the source for each position: ids and float16 log-probabilities of so
many tokens, and three numbers of 32 bit (pipeline.acceptance.quality)."""
_RTX_MEMORY_PER_DATA_BYTE = 1.7
"""Peak anonymous memory of a TensorRT-RTX build over the bytes of the graph's weights: 12.6 GB for
7.52 GB (Mistral-7B's shape), the plan streamed into its file. The graph's weights are mapped beside
it (20.2 GB resident), and those pages can be dropped. Measured 2026-11-25 (docs/benchmarks.md)."""
_RTX_MEMORY_MIN_BYTES = 1_500_000_000  # SmolLM2 with two profiles, 2026-11-24
_TRTLLM_RSS_PER_ENGINE_BYTE = 2.0
"""An estimate, never measured: the weights that were read and the engine that is serialized."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What follows from shape, quantization and format.

    Attributes:
        params: All parameters, a tied embedding counted once.
        quantized_params: Weights stored and multiplied as FP8.
        linear_16bit_params: Weights of the layers' linears that are 16-bit.
        kept_16bit: How many linears `keep_16bit` picks; 0 without FP8.
        kept_16bit_extra_bytes: What keeping them costs against FP8.
        weight_bytes: Weights and scales as stored.
        checkpoint_bytes: Safetensors of the checkpoint.
        engine_bytes: The engine; an estimate.
        step_weight_bytes: Weights that one decode step reads: everything but the embedding table,
            of which it reads a row for each sequence. lm_head counts, tied or not.
        kv_bytes_per_element: 1 or 2.
        kv_bytes_per_token: Keys and values of one token in all layers.
    """

    params: int
    quantized_params: int
    linear_16bit_params: int
    kept_16bit: int
    kept_16bit_extra_bytes: int
    weight_bytes: int
    checkpoint_bytes: int
    engine_bytes: int
    step_weight_bytes: int
    kv_bytes_per_element: int
    kv_bytes_per_token: int

    def to_json(self) -> dict[str, Any]:
        return vars(self).copy()


def sizes_of(request: PlanRequest) -> Sizes:
    """Sizes of the model as the request quantizes it."""
    shape = request.shape
    modules = linear_modules(shape)
    fp8 = request.quantization == "fp8"
    kept = select(request.keep_16bit, modules) if fp8 else ()
    kept_params = sum(modules[name] for name in kept)
    quantized_params = shape.linear_params - kept_params if fp8 else 0
    linear_16bit_params = shape.linear_params - quantized_params
    scales = 2 * (len(modules) - len(kept)) + 2 * shape.num_hidden_layers if fp8 else 0
    linear_bytes = quantized_params + 2 * linear_16bit_params + _SCALE_BYTES * scales
    tables = 1 if shape.tie_word_embeddings else 2
    weight_bytes = linear_bytes + 2 * (tables * shape.embedding_params + shape.other_params)
    # The static cache of TensorRT-RTX is 16-bit whatever was asked; asking for FP8 is a fault.
    kv_element = 2 if request.format == "trtrtx" else kv_element_bytes(request)
    return Sizes(
        params=shape.params,
        quantized_params=quantized_params,
        linear_16bit_params=linear_16bit_params,
        kept_16bit=len(kept),
        kept_16bit_extra_bytes=kept_params,
        weight_bytes=weight_bytes,
        checkpoint_bytes=weight_bytes,
        engine_bytes=weight_bytes + _engine_overhead_bytes(request.format),
        step_weight_bytes=linear_bytes + 2 * (shape.embedding_params + shape.other_params),
        kv_bytes_per_element=kv_element,
        kv_bytes_per_token=shape.kv_bytes_per_token(kv_element),
    )


def kv_element_bytes(request: PlanRequest) -> int:
    """Bytes of one element of the cache; an unknown dtype, which is a fault, counts as 16-bit."""
    return KV_BYTES_PER_ELEMENT.get(request.limits.kv_cache_dtype, 2)


def _engine_overhead_bytes(engine_format: Format) -> int:
    """What an engine holds beside weights. TensorRT-LLM's kernels are in its libraries."""
    return _RTX_PROFILES * _RTX_SOURCE_BYTES_PER_PROFILE if engine_format == "trtrtx" else 0


@dataclass(frozen=True, kw_only=True)
class BuildNeeds:
    """Disk and memory of the machine that builds; estimates, shown and not refused.

    Attributes:
        disk_bytes: Artefact -> bytes, all kept at once: fetched weights (16-bit), checkpoint, what
            the compiler reads, engine, the source's log-probabilities on the held-out text.
        quantize_ram_bytes: Memory for quantizing on a CPU in float32.
        quantize_ram_min_bytes: The same in bfloat16, which is taken where float32 does not fit.
        compile_ram_bytes: Memory for the compiler; 0 where nothing is compiled.
        source: Where the two RAM figures come from.
    """

    disk_bytes: dict[str, int]
    quantize_ram_bytes: int
    quantize_ram_min_bytes: int
    compile_ram_bytes: int
    source: str

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "disk_total_bytes": sum(self.disk_bytes.values())}


def build_needs(request: PlanRequest, sizes: Sizes) -> BuildNeeds:
    """What building takes."""
    disk = {"weights": 2 * sizes.params, "checkpoint": sizes.checkpoint_bytes}
    source = "quantize: 4 B x parameters + the checkpoint + 3.2 GB, from SmolLM2 (2026-11-24)"
    compile_ram = 0
    if request.format != "checkpoint":
        disk |= {"converted": sizes.weight_bytes, "engine": sizes.engine_bytes}
    if request.judged_positions:
        vocab_size = request.shape.vocab_size
        pair_bytes = 2 + (2 if vocab_size <= 1 << 16 else 4)
        row_bytes = min(_KEPT_TOKENS, vocab_size) * pair_bytes + _PER_POSITION_BYTES
        disk["source_logprobs"] = request.judged_positions * row_bytes
    if request.format == "trtrtx":
        from_weights = int(_RTX_MEMORY_PER_DATA_BYTE * sizes.weight_bytes)
        compile_ram = max(_RTX_MEMORY_MIN_BYTES, from_weights)
        source += "; compile: 1.7 x the graph's weights, measured 2026-11-25"
    elif request.format == "trtllm":
        compile_ram = int(_TRTLLM_RSS_PER_ENGINE_BYTE * sizes.engine_bytes)
        source += "; compile: 2 x the engine, not measured"
    beside_weights = sizes.checkpoint_bytes + _QUANTIZE_BASE_BYTES
    return BuildNeeds(
        disk_bytes=disk,
        quantize_ram_bytes=4 * sizes.params + beside_weights,
        quantize_ram_min_bytes=2 * sizes.params + beside_weights,
        compile_ram_bytes=compile_ram,
        source=source,
    )


def gib(size_bytes: float) -> str:
    """Bytes for people, such as `8.46 GiB`; below 0.1 GiB in MiB."""
    if size_bytes < 0.1 * GIB:
        return f"{size_bytes / (1 << 20):.0f} MiB"
    return f"{size_bytes / GIB:.2f} GiB"
