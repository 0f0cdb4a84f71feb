"""Which runner executes which workload: told from the recipe alone, before anything is built."""

from __future__ import annotations

from collections.abc import Collection

from pipeline.runners.session import Ability
from pipeline.runners.workload import Workload

WHO_CAN: dict[Ability, str] = {
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
        f"({WHO_CAN[key]}); leave it out of workload {workload.name}, or choose another runner"
        for key in needed(workload)
        if key not in abilities
    )
