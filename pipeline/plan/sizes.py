"""What a plan is asked about, and how many bytes that takes: stored, on the card, while building.

A paged runtime takes KV cache as sequences grow, so it must hold what the workloads hold at their
end; more requests wait in its queue. A static cache is allocated whole: its largest batch at full
context must fit, past and present in one buffer.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any

import pydantic.dataclasses
from annotated_types import Gt, Le
from pydantic import Strict

from pipeline.core.errors import Fault
from pipeline.core.hardware import GIB, Target
from pipeline.core.values import Limits
from pipeline.formats.spec import FormatSpec
from pipeline.model.spec import ModelSpec
from pipeline.quant.spec import KV_CACHE_DTYPES, KvCacheDtype, QuantSpec, select

Count = Annotated[int, Strict(), Gt(0)]
Rate = Annotated[float, Strict(), Gt(0)]
Share = Annotated[float, Strict(), Gt(0), Le(1)]


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedWorkload:
    """What a plan needs of a workload that acceptance measures on the target card.

    Attributes:
        name: In the report.
        batch: Requests at once: what the card's memory must hold.
        isl: Tokens of every prompt, or of the longest where they differ.
        osl: Output tokens of every request, or the most where they differ.
        min_output_tokens_per_s: Wanted rate of the whole batch; None to measure only.
        min_share_of_ceiling: The same as a share of what the card allows at this workload, by the
            plan: 0.65 stays right when the model or the card changes.
    """

    name: Annotated[str, Strict()]
    batch: Count
    isl: Count
    osl: Count
    min_output_tokens_per_s: Rate | None = None
    min_share_of_ceiling: Share | None = None

    def mean_isl(self, seed: int) -> float:
        """Mean prompt length of one run, tokens; `seed` is the acceptance's."""
        return self.isl

    def mean_osl(self, seed: int) -> float:
        """Mean output length of one run, tokens."""
        return self.osl


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """All that a plan depends on: one recipe, as far as sizes and ceilings need it.

    `judged_positions` are the tokens of held-out text whose predictions acceptance keeps, of source
    and checkpoint together; 0 where the whole model is not run. `faults` are those beyond sizes,
    such as a workload that the runner does not execute.
    """

    name: str
    shape: ModelSpec
    target: Target
    format: FormatSpec
    precision: QuantSpec  # of the linears in the layers
    keep_16bit: tuple[str, ...] = ()  # patterns (fnmatch) of linears that stay 16-bit
    limits: Limits
    workloads: tuple[PlannedWorkload, ...] = ()
    runtime: tuple[str, str]  # what will run the engine; an empty version where not known
    judged_positions: int = 0
    seed: int = 0  # of drawn lengths
    faults: tuple[Fault, ...] = ()


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

    `step_weight_bytes` are all weights but the embedding table, of which a decode step reads a row
    for each sequence. lm_head counts, tied or not.
    """

    params: int  # all; a tied embedding counts once
    quantized_params: int
    linear_16bit_params: int  # weights of the layers' linears that are 16-bit
    kept_16bit: int  # how many linears `keep_16bit` picks; 0 where nothing is quantized
    kept_16bit_extra_bytes: int
    weight_bytes: int  # safetensors of the checkpoint: weights and scales
    engine_bytes: int
    step_weight_bytes: int
    kv_cache: KvCacheDtype  # an unknown one, which is a fault, counts as 16-bit
    kv_bytes_per_token: int  # keys and values of one token in all layers

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
    group = precision.group_size(shape)
    stored = {name: precision.linear_bytes(*modules[name], group) for name in modules}
    linear_bytes = 2 * linear_16bit_params
    if quantizes:
        linear_bytes += sum(stored[name] for name in modules.keys() - set(kept))
        linear_bytes += _CACHE_SCALE_BYTES * shape.num_layers
    weight_bytes = linear_bytes + 2 * (shape.params - shape.linear_params)
    kv_cache = KV_CACHE_DTYPES["bfloat16"]
    if request.limits.kv_cache_dtype in request.format.kv_cache_dtypes:
        kv_cache = KV_CACHE_DTYPES[request.limits.kv_cache_dtype]
    return Sizes(
        params=shape.params,
        quantized_params=quantized_params,
        linear_16bit_params=linear_16bit_params,
        kept_16bit=len(kept),
        kept_16bit_extra_bytes=2 * kept_params - sum(stored[name] for name in kept),
        weight_bytes=weight_bytes,
        engine_bytes=weight_bytes + request.format.fit.overhead_bytes,
        step_weight_bytes=linear_bytes + 2 * (shape.params_read(0) - shape.linear_params),
        kv_cache=kv_cache,
        kv_bytes_per_token=shape.kv_bytes(1, kv_cache.bytes_per_element),
    )


@dataclass(frozen=True, kw_only=True)
class BuildNeeds:
    """Disk and memory of the machine that builds; estimates, shown and not refused.

    Quantizing on a CPU is in float32, and takes the least in bfloat16, where that does not fit.
    """

    disk_bytes: dict[str, int]
    quantize_ram_bytes: int
    quantize_ram_min_bytes: int
    compile_ram_bytes: int
    source: str

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "disk_total_bytes": sum(self.disk_bytes.values())}


def build_needs(request: PlanRequest, sizes: Sizes) -> BuildNeeds:
    """Of artefacts all are kept at once."""
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


_CONTEXT_BYTES = GIB // 2
"""CUDA context and kernels of one process; an estimate: 0.3 GB for PyTorch with lazy loading
(PyTorch issue 107667), 0.1 to 0.55 GiB bare, growing with the card (llama.cpp PR 23604)."""


def workspace_bytes(request: PlanRequest, limits: Limits) -> int:
    """Device memory for everything but weights and cache; an estimate, never measured.

    - CUDA context.
    - Logits of one step in float32, and their softmax: 2 x batch x vocabulary x 4 B.
    - Activations at the widest point of a layer, 16-bit, for all tokens of one step.
    - The attention mask of one step, where the format has one.
    """
    widest = max(layer.widest_features for layer in request.shape.layers)
    total = _CONTEXT_BYTES + 2 * 4 * limits.max_batch_size * request.shape.vocab_size
    total += 2 * limits.max_num_tokens * widest
    return total + request.format.fit.mask_bytes * limits.max_num_tokens * limits.max_seq_len


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Device memory, and what is left of it for the KV cache.

    `full_length_sequences` is the largest batch at `max_seq_len` that fits, with its own workspace;
    at most `max_num_tokens`, of which a decode step takes one for each sequence.
    """

    usable_bytes: int  # what the runtime may use of the card
    engine_bytes: int
    workspace_bytes: int
    kv_bytes_per_token: int
    state_bytes: int  # what a sequence holds beside its cache, whatever its length
    static_kv_bytes: int  # cache of the largest batch at full context, if allocated whole; else 0
    full_length_sequences: int
    max_context: int  # at `max_batch_size`, at most what the model was trained for

    @property
    def kv_budget_bytes(self) -> int:
        """What weights and workspace leave; negative if they do not fit themselves."""
        return self.usable_bytes - self.engine_bytes - self.workspace_bytes

    def holds(self, batch: int, context: int) -> bool:
        return batch * self.sequence_bytes(context) <= self.kv_budget_bytes

    def sequence_bytes(self, context: int) -> int:
        return context * self.kv_bytes_per_token + self.state_bytes

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "kv_budget_bytes": self.kv_budget_bytes}


def fit_of(request: PlanRequest, sizes: Sizes) -> Fit:
    """What fits the request's card."""
    limits, shape, rule = request.limits, request.shape, request.format.fit
    usable = int(request.target.memory_bytes * rule.usable_share)

    def sequence_bytes(context: int) -> int:
        return context * sizes.kv_bytes_per_token + shape.state_bytes

    def fits(batch: int, context: int) -> bool:
        tried = replace(limits, max_batch_size=batch, max_seq_len=context)
        if rule.static:  # its prefill takes whole prompts
            tokens = limits.max_num_tokens * context // max(limits.max_seq_len, 1)
            tried = replace(tried, max_num_tokens=tokens)
        elif batch < limits.max_batch_size:  # its workspace is that of the limits
            tried = replace(tried, max_batch_size=limits.max_batch_size)
        held = sizes.engine_bytes + workspace_bytes(request, tried)
        return held + batch * sequence_bytes(context) <= usable

    full_batch = limits.max_batch_size * sequence_bytes(limits.max_seq_len)
    return Fit(
        usable_bytes=usable,
        engine_bytes=sizes.engine_bytes,
        workspace_bytes=workspace_bytes(request, limits),
        kv_bytes_per_token=sizes.kv_bytes_per_token,
        state_bytes=shape.state_bytes,
        static_kv_bytes=full_batch if rule.static else 0,
        full_length_sequences=_largest(
            limits.max_num_tokens, lambda batch: fits(batch, limits.max_seq_len)
        ),
        max_context=_largest(
            shape.max_position_embeddings, lambda context: fits(limits.max_batch_size, context)
        ),
    )


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest size from 1 to `most` that fits, if all smaller ones do; 0 if none does."""
    return bisect.bisect(range(1, most + 1), False, key=lambda size: not fits(size))
