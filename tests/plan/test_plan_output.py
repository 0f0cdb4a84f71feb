"""What a plan looks like, and what it costs to make one."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from rich.console import Console

from pipeline.plan import make_plan, render
from pipeline.plan.sizes import PlannedWorkload, PlanRequest
from tests.tiny_recipe import ROOT, run_python

Ask = Callable[..., PlanRequest]
WORKLOADS = (
    PlannedWorkload(name="b1", batch=1, isl=128, osl=256, min_output_tokens_per_s=312),
    PlannedWorkload(name="b64", batch=64, isl=1024, osl=1024, min_output_tokens_per_s=2000),
)


def request(ask: Ask) -> PlanRequest:
    return ask(
        format="trtllm",
        runtime=("tensorrt-llm", "1.2.1"),
        max_batch_size=64,
        workloads=WORKLOADS,
        keep_16bit=("*.down_proj",),
    )


def shown(ask: Ask, width: int) -> str:
    console = Console(width=width, force_terminal=False)
    with console.capture() as capture:
        console.print(render(make_plan(request(ask))))
    return capture.get()


@pytest.mark.parametrize("width", [60, 80])
def test_tables_fit_a_narrow_screen_without_cutting_a_number(width: int, ask: Ask) -> None:
    text = shown(ask, width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "workload batch isl osl ceiling no KV bound target share" in lines
    ceilings = [workload["ceiling"] for workload in make_plan(request(ask)).to_json()["workloads"]]
    for name, ceiling in zip(("b1 1 128 256", "b64 64 1024 1024"), ceilings, strict=True):
        assert any(line.startswith(f"{name} {ceiling:.0f} ") for line in lines)


def test_json_holds_what_the_table_shows(ask: Ask) -> None:
    plan = make_plan(request(ask))
    data = json.loads(json.dumps(plan.to_json()))
    assert data["schema"] == 1
    assert data["target"]["card"] == "NVIDIA-GeForce-RTX-4090"
    assert data["limits"]["max_batch_size"] == 64
    assert data["sizes"]["params"] == 8_030_261_248
    assert data["fit"]["kv_budget_bytes"] == plan.fit.kv_budget_bytes
    assert [workload["name"] for workload in data["workloads"]] == ["b1", "b64"]
    assert data["workloads"][0]["reachable_batch"] == plan.workloads[0].reachable_batch
    assert data["build"]["disk_total_bytes"] == sum(plan.build.disk_bytes.values())
    assert data["faults"][0]["path"] == "acceptance.targets[0].min_output_tokens_per_s"


def test_import_is_light() -> None:
    code = (
        "import sys, pipeline.plan\n"
        "heavy = {'torch', 'transformers', 'numpy', 'onnx', 'rich', 'hydra', 'yaml'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    assert run_python(ROOT, "-c", code).stdout.strip() == "[]"
