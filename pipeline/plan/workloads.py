"""Ceilings of each declared workload."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.plan.ceilings import Roofline
from pipeline.plan.fit import Fit
from pipeline.plan.request import PlannedWorkload, PlanRequest


@dataclass(frozen=True, kw_only=True)
class WorkloadPlan:
    """What the card allows at one workload. All rates are tokens per second of the whole batch.

    Attributes:
        name: Name of the workload.
        batch: Requests running at once.
        isl: Prompt tokens of each.
        osl: Output tokens of each.
        ceiling: Most output tokens per second while it decodes, reading its KV cache.
        ceiling_without_kv: The same if no cache had to be read.
        bound: `memory` or `compute`: what sets the ceiling.
        target: Wanted output tokens per second, or None; a wanted share of the ceiling counts.
        share: Target over ceiling, or None.
        reachable_batch: Smallest batch at which the target is reachable; None where there is no
            target, or no such batch that fits.
        prefill_tokens_per_s: Most prompt tokens per second.
        ttft_floor_ms: Least time to first token of one prompt alone.
    """

    name: str
    batch: int
    isl: int
    osl: int
    ceiling: float
    ceiling_without_kv: float
    bound: str
    target: float | None
    share: float | None
    reachable_batch: int | None
    prefill_tokens_per_s: float
    ttft_floor_ms: float

    def to_json(self) -> dict[str, Any]:
        return vars(self).copy()


def plan_workload(
    workload: PlannedWorkload, request: PlanRequest, roofline: Roofline, fit: Fit
) -> WorkloadPlan:
    """Ceilings of one workload.

    Where lengths differ, those of the mean request: answers that vary make the mean context of a
    token longer than that, which only lowers what is reached.
    """
    isl = workload.isl if workload.mean_isl is None else workload.mean_isl
    osl = workload.osl if workload.mean_osl is None else workload.mean_osl
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
