"""What each precision would take of a card, and allow on it: the other quantizers of one recipe.

    for each in compare(request):  # a row for each precision, the request's own among them
        print(each.title, each.weight_bytes, each.workloads)

What a recipe keeps in 16 bits was chosen for its own precision; the others keep nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pipeline.plan.ceilings import WorkloadPlan, plan_workload, roofline
from pipeline.plan.sizes import PlanRequest, fit_of, gib, sizes_of
from pipeline.quant.spec import QuantSpec, quant_specs, quantizer_faults

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class PrecisionPlan:
    """One precision; `refused` says why there is no such engine, and is empty where there is.

    `kv_budget_bytes`: what weights and workspace leave for the cache, negative if they do not fit.
    """

    name: str
    title: str
    refused: str
    weight_bytes: int
    kv_budget_bytes: int
    workloads: tuple[WorkloadPlan, ...]

    def to_json(self) -> dict[str, Any]:
        kept = ("name", "ceiling", "target", "share")
        workloads = [{key: getattr(one, key) for key in kept} for one in self.workloads]
        return {**vars(self), "workloads": workloads}


def compare(request: PlanRequest) -> tuple[PrecisionPlan, ...]:
    """Every precision, the smallest weights last."""
    rows = [_row(request, precision) for precision in quant_specs().values()]
    return tuple(sorted(rows, key=lambda row: -row.weight_bytes))


def _row(request: PlanRequest, precision: QuantSpec) -> PrecisionPlan:
    kept = request.keep_16bit if precision.name == request.precision.name else ()
    asked = replace(request, precision=precision, keep_16bit=kept)
    sizes = sizes_of(asked)
    fit, line = fit_of(asked, sizes), roofline(asked, sizes)
    refused = ""
    if not request.format.holds(precision):
        refused = f"not in {request.format.name}"
    elif quantizer_faults(precision, kept, request.shape):
        refused = "no group divides"
    elif fit.kv_budget_bytes < fit.kv_bytes_per_token:
        refused = "does not fit"
    return PrecisionPlan(
        name=precision.name,
        title=precision.title,
        refused=refused,
        weight_bytes=sizes.weight_bytes,
        kv_budget_bytes=fit.kv_budget_bytes,
        workloads=tuple(plan_workload(one, asked, line, fit) for one in request.workloads),
    )


def precision_table(rows: tuple[PrecisionPlan, ...], own: str) -> Table:
    """Weights, what is left for the cache, and of each workload the ceiling and the target."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0), title="precisions", title_justify="left")
    table.add_column("weights")
    for heading in ("size", "cache left"):
        table.add_column(heading, justify="right")
    for workload in rows[0].workloads:
        table.add_column(workload.name, justify="right", overflow="fold")
    for row in rows:
        mark = "*" if row.name == own else ""
        left = row.refused or gib(row.kv_budget_bytes)
        cells = (_cell(one) for one in row.workloads)
        table.add_row(row.title + mark, gib(row.weight_bytes), left, *cells)
    return table


def _cell(workload: WorkloadPlan) -> str:
    """The ceiling, and whether a target lies below it, such as `488, 64%`."""
    if workload.share is None:
        return f"{workload.ceiling:.0f}"
    reached = f"{workload.share:.0%}" if workload.share <= 1 else "no"
    return f"{workload.ceiling:.0f}, {reached}"
