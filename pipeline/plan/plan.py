"""`make_plan`: the whole plan of one recipe, in a few milliseconds and without any download."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pipeline.core.errors import Fault, RecipeError
from pipeline.plan.ceilings import REACHABLE_SHARE, roofline
from pipeline.plan.findings import (
    Note,
    fit_findings,
    known_bad_findings,
    limit_faults,
    target_findings,
)
from pipeline.plan.fit import Fit, fit_of
from pipeline.plan.request import PlanRequest
from pipeline.plan.sizes import BuildNeeds, Sizes, build_needs, sizes_of
from pipeline.plan.workloads import WorkloadPlan, plan_workload
from pipeline.quant.spec import keep_16bit_faults


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What follows from a request.

    Attributes:
        request: What was asked.
        sizes: Parameters and bytes.
        fit: The card's memory.
        workloads: Ceilings, in the order of the request's workloads.
        build: Disk and RAM that building needs.
        faults: Why it must not be built; empty if it may.
        notes: What to know.
    """

    request: PlanRequest
    sizes: Sizes
    fit: Fit
    workloads: tuple[WorkloadPlan, ...]
    build: BuildNeeds
    faults: tuple[Fault, ...]
    notes: tuple[Note, ...]

    def to_json(self) -> dict[str, Any]:
        """For programs; sizes in bytes, rates in tokens per second. Later versions only add."""
        request = self.request
        return {
            "schema": 1,
            "name": request.name,
            "format": request.format.name,
            "quantization": request.precision.name,
            "keep_16bit": list(request.keep_16bit),
            "runtime": {"name": request.runtime[0], "version": request.runtime[1]},
            "target": asdict(request.target),
            "shape": dict(request.shape.config),
            "limits": request.limits.to_json(),
            "sizes": self.sizes.to_json(),
            "fit": self.fit.to_json(),
            "reachable_share": REACHABLE_SHARE,
            "workloads": [workload.to_json() for workload in self.workloads],
            "build": self.build.to_json(),
            "faults": [asdict(fault) for fault in self.faults],
            "notes": [note.to_json() for note in self.notes],
        }


def make_plan(request: PlanRequest) -> Plan:
    """Plan a recipe: pure, no network, no GPU. Never refuses by itself: see `refuse`."""
    sizes = sizes_of(request)
    fit = fit_of(request, sizes)
    line = roofline(request, sizes)
    workloads = tuple(plan_workload(workload, request, line, fit) for workload in request.workloads)
    found: tuple[Fault | Note, ...] = (
        *limit_faults(request),
        *keep_16bit_faults(request.keep_16bit, request.shape),
        *fit_findings(request, fit),
        *target_findings(request, workloads),
        *known_bad_findings(request),
        *request.faults,
    )
    return Plan(
        request=request,
        sizes=sizes,
        fit=fit,
        workloads=workloads,
        build=build_needs(request, sizes),
        faults=tuple(each for each in found if isinstance(each, Fault)),
        notes=tuple(each for each in found if isinstance(each, Note)),
    )


def refuse(plan: Plan) -> None:
    """Stop a build that must not start.

    Raises:
        RecipeError: With all faults of the plan, if it has any.
    """
    if plan.faults:
        raise RecipeError(plan.faults)
