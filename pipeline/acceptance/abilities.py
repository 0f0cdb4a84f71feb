"""What acceptance asks of a runner, held against what that runner executes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.core.errors import Fault
from pipeline.runners.runner import WHO_CAN, Runner, why_not_workload

if TYPE_CHECKING:
    from pipeline.acceptance.acceptance import Acceptance


def ability_faults(acceptance: Acceptance, runner: Runner) -> tuple[Fault, ...]:
    """What acceptance asks of a runner that it does not execute.

    Only what would run: no speed is measured on a CPU.
    """
    faults = []
    for index, load in enumerate(acceptance.targets if runner.device == "cuda" else ()):
        path = f"acceptance.targets[{index}]"
        faults += [Fault(path, why) for why in why_not_workload(runner, load)]
    sustained = acceptance.sustained
    if sustained.clear_cache and "clear_cache" not in runner.abilities:
        faults.append(
            Fault(
                "acceptance.sustained.clear_cache",
                f"runner {runner.name} has no cache that can be cleared from here "
                f"({WHO_CAN['clear_cache']}); set it to false, or choose another runner",
            )
        )
    return tuple(faults)
