"""How fast a card can be at most: bytes over bandwidth, FLOPs over the tensor peak.

A decode step reads every weight and the keys and values of every sequence once, and multiplies each
weight with each sequence's activation. So no runtime generates more than

    batch / max((weight bytes + batch x KV bytes) / bandwidth, batch x FLOPs per token / peak)

tokens per second without speculation. What is left out (attention FLOPs, activations, launch
times) only lowers what is reached, so the ceiling stays one. It holds for weights that exceed the
card's L2 cache (72 MB on an RTX 4090); a toy model can live there and be faster.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.plan.sizes import Fit, PlannedWorkload, PlanRequest, Sizes

REACHABLE_SHARE = 0.65
"""Share of the ceiling that is held to be reachable. TensorRT-LLM with Mistral-7B INT4 AWQ on an
RTX 4090 at batch 1: 170.6 tok/s (jan, benchmarking-nvidia-tensorrt-llm.mdx), 65 % of the 260 that
its 3.87 GB allow. Faster memory is harder to saturate: vLLM 0.24 with Phi-3-mini FP8 on an H100
reached 357 of 877 (41 %; our measurement, 2026-11-24)."""

_MAX_BATCH = 4096  # beyond any limit that a recipe sets; ends the search of `reachable_batch`


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """One model on one card, reduced to the numbers that bound its speed."""

    bandwidth_bytes_per_s: float
    step_weight_bytes: int  # weights that a decode step reads, whatever the batch
    kv_bytes_per_token: int  # cache that a decode step reads for each token of context
    windows: tuple[int | None, ...]  # of each layer: context beyond it is not read; None for all
    layer_s_per_token: float  # tensor time of the layers' linears for one token, at peak
    lm_head_s_per_token: float  # the same of lm_head

    def decode_tokens_per_s(self, batch: int, context: float) -> float:
        """Ceiling of a whole batch whose sequences read `context` tokens of cache each."""
        return batch / max(self._memory_s(batch, context), self._compute_s(batch))

    def decode_bound(self, batch: int, context: float) -> str:
        return "memory" if self._memory_s(batch, context) >= self._compute_s(batch) else "compute"

    def _memory_s(self, batch: int, context: float) -> float:
        kv_bytes = batch * context * self.kv_bytes_per_token
        return (self.step_weight_bytes + kv_bytes) / self.bandwidth_bytes_per_s

    def _compute_s(self, batch: int) -> float:
        return batch * (self.layer_s_per_token + self.lm_head_s_per_token)

    def prefill_tokens_per_s(self) -> float:
        """Ceiling of prompt tokens per second; lm_head sees only the last token of a prompt."""
        return 1 / self.layer_s_per_token

    def ttft_floor_ms(self, isl: float) -> float:
        """Least time to the first token of one prompt that has the card for itself."""
        compute_s = isl * self.layer_s_per_token + self.lm_head_s_per_token
        return 1e3 * max(compute_s, self._memory_s(1, 0))

    def mean_context(self, isl: float, osl: float) -> float:
        """Tokens of cache that a decode step reads for one sequence, mean of output and layers.

        The step that makes output token `t + 1` (`t` from 1) reads `isl + t` of them: the first
        output token comes from the prefill.
        """
        steps, seen = max(osl - 1, 1), 0.0
        for window, layers in Counter(self.windows).items():
            edge = window if window is not None else isl + steps
            growing = min(max(edge - isl, 0), steps)  # steps that still see all of the context
            whole = growing * isl + growing * (growing + 1) / 2 + (steps - growing) * edge
            seen += layers * whole
        return seen / (steps * len(self.windows))

    def reachable_batch(
        self, tokens_per_s: float, context: float, fits: Callable[[int], bool]
    ) -> int | None:
        """Smallest batch that `fits` and has the target at `REACHABLE_SHARE` of its ceiling."""
        for batch in range(1, _MAX_BATCH + 1):
            if not fits(batch):
                return None
            if tokens_per_s / self.decode_tokens_per_s(batch, context) <= REACHABLE_SHARE:
                return batch
        return None


def roofline(request: PlanRequest, sizes: Sizes) -> Roofline:
    """The roofline of a model on a card; operands that it lacks count at the 16-bit peak."""
    shape, target = request.shape, request.target
    fp16_flops, quantized_flops = target.flops("fp16"), target.flops(request.precision.operands)
    return Roofline(
        bandwidth_bytes_per_s=target.bandwidth_gb_s * 1e9,
        step_weight_bytes=sizes.step_weight_bytes,
        kv_bytes_per_token=sizes.kv_bytes_per_token,
        windows=shape.windows,
        layer_s_per_token=2
        * (sizes.quantized_params / quantized_flops + sizes.linear_16bit_params / fp16_flops),
        lm_head_s_per_token=2 * shape.embedding_params / fp16_flops,
    )


@dataclass(frozen=True, kw_only=True)
class WorkloadPlan:
    """What the card allows at one workload. All rates are tokens per second of the whole batch."""

    name: str
    batch: int
    isl: int
    osl: int
    ceiling: float  # most output tokens per second while it decodes, reading its KV cache
    ceiling_without_kv: float
    bound: str  # `memory` or `compute`: what sets the ceiling
    target: float | None  # wanted output tokens per second; a wanted share of the ceiling counts
    share: float | None
    reachable_batch: int | None  # smallest that fits and reaches the target
    prefill_tokens_per_s: float
    ttft_floor_ms: float  # least time to first token of one prompt alone


def plan_workload(
    workload: PlannedWorkload, request: PlanRequest, roofline: Roofline, fit: Fit
) -> WorkloadPlan:
    """Ceilings of one workload; where lengths differ, of the mean request.

    Answers that vary make a token's mean context longer than that, which lowers what is reached.
    """
    isl, osl = workload.mean_isl(request.seed), workload.mean_osl(request.seed)
    context = roofline.mean_context(isl, osl)
    ceiling = roofline.decode_tokens_per_s(workload.batch, context)
    share = workload.min_share_of_ceiling
    target = workload.min_output_tokens_per_s if share is None else share * ceiling
    if share is None and target is not None:
        share = target / ceiling
    total = workload.isl + workload.osl
    # A static cache holds every sequence at full context, however short it is.
    held = request.limits.max_seq_len if fit.static_kv_bytes else total
    return WorkloadPlan(
        name=workload.name,
        batch=workload.batch,
        isl=workload.isl,
        osl=workload.osl,
        ceiling=ceiling,
        ceiling_without_kv=roofline.decode_tokens_per_s(workload.batch, 0),
        bound=roofline.decode_bound(workload.batch, context),
        target=target,
        share=share,
        reachable_batch=(
            None
            if target is None
            else roofline.reachable_batch(target, context, lambda batch: fit.holds(batch, held))
        ),
        prefill_tokens_per_s=roofline.prefill_tokens_per_s(),
        ttft_floor_ms=roofline.ttft_floor_ms(isl),
    )
