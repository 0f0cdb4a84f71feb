"""What follows from the recipe alone: does it fit, what is its ceiling, what is known to be bad.

    plan = make_plan(PlanRequest(name="llama3.1", shape=shape, target=target, ...))
    print(render(plan))   # a table for people; plan.to_json() for programs
    refuse(plan)          # RecipeError with every fault, before anything is downloaded

Pure: nothing here reads the network, a GPU or an environment variable, or imports torch.
"""

from pipeline.plan.ceilings import WorkloadPlan
from pipeline.plan.findings import Note
from pipeline.plan.plan import Plan, make_plan, refuse, render
from pipeline.plan.sizes import PlannedWorkload, PlanRequest

__all__ = [
    "Note",
    "Plan",
    "PlanRequest",
    "PlannedWorkload",
    "WorkloadPlan",
    "make_plan",
    "refuse",
    "render",
]
