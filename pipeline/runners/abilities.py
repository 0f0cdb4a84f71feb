"""Which runner executes which workload: told from the recipe alone, before anything is built."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from pipeline.core.errors import Fault
from pipeline.runners.session import Ability, Runner

if TYPE_CHECKING:
    from pipeline.acceptance.acceptance import Acceptance
    from pipeline.acceptance.workload import Workload

_WHO: dict[Ability, str] = {
    "requests": "runner=vllm, tensorrt_rtx and onnxruntime do",
    "isl_distribution": "runner=vllm, tensorrt_rtx and onnxruntime do",
    "prompts_file": "runner=vllm, tensorrt_rtx and onnxruntime do",
    "osl_distribution": "runner=vllm, tensorrt_rtx and onnxruntime do",
    "ignore_eos": "runner=vllm, tensorrt_rtx and onnxruntime do",
    "request_rate": "runner=vllm does",
    "clear_cache": "runner=transformers does",
}


def needed(workload: Workload) -> tuple[Ability, ...]:
    """What a workload asks beyond one batch of equal requests."""
    asked: tuple[tuple[Ability, bool], ...] = (
        ("requests", workload.request_rate is None and workload.total_requests != workload.batch),
        ("isl_distribution", workload.isl_distribution is not None),
        ("prompts_file", workload.prompts_file is not None),
        ("osl_distribution", workload.osl_distribution is not None),
        ("ignore_eos", not workload.ignore_eos),
        ("request_rate", workload.request_rate is not None),
    )
    return tuple(ability for ability, wanted in asked if wanted)


def why_not_workload(
    name: str, abilities: Collection[Ability], workload: Workload
) -> tuple[str, ...]:
    """Why a runner does not execute a workload, with the next step; empty where it does.

    Args:
        name: Of the runner.
        abilities: `Runner.abilities`.
        workload: The load.
    """
    return tuple(
        f"runner {name} does not execute {key}{': false' if key == 'ignore_eos' else ''} "
        f"({_WHO[key]}); leave it out of workload {workload.name}, or choose another runner"
        for key in needed(workload)
        if key not in abilities
    )


def ability_faults(acceptance: Acceptance, runner: Runner) -> tuple[Fault, ...]:
    """What acceptance asks of a runner that it does not execute.

    Only what would run: the targets on a card, `cpu_workloads` on a CPU. What the baseline beside
    it on a CPU lacks is in `Workload.faults`.
    """
    kind = "targets" if runner.device == "cuda" else "cpu_workloads"
    faults = []
    for index, load in enumerate(getattr(acceptance, kind)):
        path = f"acceptance.{kind}[{index}]"
        faults += [
            Fault(path, why) for why in why_not_workload(runner.name, runner.abilities, load)
        ]
    sustained = acceptance.sustained
    if sustained.clear_cache and "clear_cache" not in runner.abilities:
        faults.append(
            Fault(
                "acceptance.sustained.clear_cache",
                f"runner {runner.name} has no cache that can be cleared from here "
                f"({_WHO['clear_cache']}); set it to false, or choose another runner",
            )
        )
    return tuple(faults)
