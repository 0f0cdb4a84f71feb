"""What a runner does not execute is known from the recipe alone, with the next step."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from pipeline.build import plan_of
from pipeline.config import load as config
from pipeline.config.compose import config_folders
from pipeline.core.errors import RecipeError
from pipeline.plan import Plan, refuse
from pipeline.runners.onnxruntime import OnnxRuntimeRunner
from pipeline.runners.runner import Ability, Runner, why_not_workload
from pipeline.runners.tensorrt_rtx import TrtRtxRunner
from pipeline.runners.transformers import TransformersRunner
from pipeline.runners.workload import Lengths, Workload
from tests.runners.trtllm.engines import RUNNER as TRTLLM
from tests.runners.vllm.test_vllm_runner import RUNNER as VLLM

PLAIN = Workload(name="plain", batch=2, isl=8, osl=4)
LOADS: dict[Ability, Workload] = {
    "requests": dataclasses.replace(PLAIN, requests=4),
    "isl_distribution": dataclasses.replace(PLAIN, isl_distribution=Lengths(min=1)),
    "prompts_file": dataclasses.replace(PLAIN, prompts_file=Path("prompts.jsonl")),
    "osl_distribution": dataclasses.replace(PLAIN, osl_distribution=Lengths(min=1)),
    "ignore_eos": dataclasses.replace(PLAIN, ignore_eos=False),
    "request_rate": dataclasses.replace(PLAIN, request_rate=1.0, requests=5),
}
RTX = TrtRtxRunner(load_timeout_s=1.0, answer_timeout_s=1.0)
EVERYTHING = set(LOADS)


@pytest.mark.parametrize(
    ("runner", "executed"),
    [
        (VLLM, EVERYTHING),
        (RTX, EVERYTHING - {"request_rate"}),
        (OnnxRuntimeRunner(), set()),
        (TransformersRunner(), set()),
        (TRTLLM, {"requests"}),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_each_runner_says_what_it_executes(runner: Runner, executed: set[Ability]) -> None:
    assert why_not_workload(runner, PLAIN) == ()
    for ability, load in LOADS.items():
        assert load.needs == (ability,)
        told = why_not_workload(runner, load)
        assert bool(told) == (ability not in executed)
        assert all(ability in why and "runner=vllm" in why for why in told)


def composed(*overrides: str) -> Plan:
    return plan_of(config.load("smollm2", overrides, folders=config_folders(None)).value)


def test_recipe_whose_runner_cannot_execute_it_is_refused_by_its_plan() -> None:
    rate = (
        "acceptance.targets=[{name: r4, batch: 4, isl: 64, osl: 64, request_rate: 4.0,"
        " requests: 100, osl_distribution: {min: 16}, ignore_eos: false}]"
    )
    card = ("compiler=checkpoint", "target=h100")
    (planned,) = composed(*card, "runner=vllm", rate).workloads
    assert planned.osl == 64  # what memory must hold
    refuse(composed(*card, "runner=vllm", rate))
    refuse(composed(*card, "runner=transformers", rate))  # a CPU does not run the targets
    with pytest.raises(RecipeError, match=r"acceptance\.targets\[0\].*request_rate \(runner=vllm"):
        refuse(composed("compiler=trtrtx", "runner=tensorrt_rtx", rate))


def test_ceiling_is_of_the_mean_lengths() -> None:
    card = ("compiler=checkpoint", "target=h100", "runner=vllm")
    fixed, drawn, mean = (
        composed(*card, f"acceptance.targets=[{{name: b, batch: 8, isl: 256, osl: {osl}}}]")
        .workloads[0]
        .ceiling
        for osl in ("256", "256, osl_distribution: {min: 1}, requests: 4000", "128")
    )
    assert fixed < drawn == pytest.approx(mean, rel=1e-3)
