"""How many bytes a model takes: on disk, in the engine, in the KV cache, and while it is built."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pipeline.core.hardware import GIB
from pipeline.plan.request import PlanRequest
from pipeline.quant.spec import KV_CACHE_DTYPES, KvCacheDtype, select

_QUANTIZE_BASE_BYTES = 3_200_000_000
"""Libraries, calibration activations and GGUF loading: what the model does not explain of the 3.9
GB peak RSS of quantizing SmolLM2 on a CPU (ModelOpt 0.47; our measurement, 2026-11-24)."""
_CACHE_SCALE_BYTES = 8
"""Scales of a quantized KV cache in a layer, which every checkpoint holds: two float32."""
_KEPT_TOKENS = 4096
_PER_POSITION_BYTES = 12
"""What acceptance keeps of the source for each position: ids and float16 log-probabilities of so
many tokens, and three numbers of 32 bit (pipeline.acceptance.quality)."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What follows from shape, quantization and format.

    Attributes:
        params: All parameters, a tied embedding counted once.
        quantized_params: Weights stored in the recipe's precision.
        linear_16bit_params: Weights of the layers' linears that are 16-bit.
        kept_16bit: How many linears `keep_16bit` picks; 0 where nothing is quantized.
        kept_16bit_extra_bytes: What keeping them costs.
        weight_bytes: Weights and scales as stored: safetensors of the checkpoint.
        engine_bytes: The engine; an estimate.
        step_weight_bytes: Weights that one decode step reads: everything but the embedding table,
            of which it reads a row for each sequence. lm_head counts, tied or not.
        kv_cache: Type of the KV cache; an unknown one, which is a fault, counts as 16-bit.
        kv_bytes_per_token: Keys and values of one token in all layers.
    """

    params: int
    quantized_params: int
    linear_16bit_params: int
    kept_16bit: int
    kept_16bit_extra_bytes: int
    weight_bytes: int
    engine_bytes: int
    step_weight_bytes: int
    kv_cache: KvCacheDtype
    kv_bytes_per_token: int

    def to_json(self) -> dict[str, Any]:
        numbers = {name: value for name, value in vars(self).items() if name != "kv_cache"}
        return {**numbers, "kv_bytes_per_element": self.kv_cache.bytes_per_element}


def sizes_of(request: PlanRequest) -> Sizes:
    """Sizes of the model as the request quantizes it."""
    shape, precision = request.shape, request.precision
    modules = shape.modules
    quantizes = precision.quant_algo is not None
    kept = select(request.keep_16bit, modules) if quantizes else ()
    kept_params = sum(math.prod(modules[name]) for name in kept)
    quantized_params = shape.linear_params - kept_params if quantizes else 0
    linear_16bit_params = shape.linear_params - quantized_params
    scale_bytes = precision.scale_bytes * (len(modules) - len(kept))
    if quantizes:
        scale_bytes += _CACHE_SCALE_BYTES * shape.num_layers
    linear_bytes = (
        int(precision.bytes_per_weight * quantized_params) + 2 * linear_16bit_params + scale_bytes
    )
    weight_bytes = linear_bytes + 2 * (shape.params - shape.linear_params)
    kv_cache = KV_CACHE_DTYPES["bfloat16"]
    if request.limits.kv_cache_dtype in request.format.kv_cache_dtypes:
        kv_cache = KV_CACHE_DTYPES[request.limits.kv_cache_dtype]
    return Sizes(
        params=shape.params,
        quantized_params=quantized_params,
        linear_16bit_params=linear_16bit_params,
        kept_16bit=len(kept),
        kept_16bit_extra_bytes=int((2 - precision.bytes_per_weight) * kept_params),
        weight_bytes=weight_bytes,
        engine_bytes=weight_bytes + request.format.fit.overhead_bytes,
        step_weight_bytes=linear_bytes + 2 * (shape.params_read(0) - shape.linear_params),
        kv_cache=kv_cache,
        kv_bytes_per_token=shape.kv_bytes(1, kv_cache.bytes_per_element),
    )


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
    disk = {"weights": 2 * sizes.params, "checkpoint": sizes.weight_bytes}
    source = "quantize: 4 B x parameters + the checkpoint + 3.2 GB, from SmolLM2 (2026-11-24)"
    compile_ram = 0
    if request.format.memory is not None:
        disk |= {"converted": sizes.weight_bytes, "engine": sizes.engine_bytes}
    if request.judged_positions:
        vocab_size = request.shape.vocab_size
        pair_bytes = 2 + (2 if vocab_size <= 1 << 16 else 4)
        row_bytes = min(_KEPT_TOKENS, vocab_size) * pair_bytes + _PER_POSITION_BYTES
        disk["source_logprobs"] = request.judged_positions * row_bytes
    if memory := request.format.memory:
        compile_ram = memory.needed_bytes(sizes.weight_bytes)
        source += f"; compile: {memory.source}"
    beside_weights = sizes.weight_bytes + _QUANTIZE_BASE_BYTES
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
