"""What actionlint does not ask of the workflows: pins, permissions, limits, and no free text."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.specs import NOT_FOR_TRTLLM

FOLDER = Path(".github/workflows")
NAMES = ("ci.yml", "engine.yml", "rehearse-and-rtx.yml")

_PIN = re.compile(r"uses: ([\w-]+/[\w.-]+)@([0-9a-f]{40}) # (v\d+\.\d+\.\d+)$", re.MULTILINE)

Workflow = Mapping[Any, Any]


def load(name: str) -> Workflow:
    parsed: Workflow = yaml.safe_load((FOLDER / name).read_text())
    return parsed


def triggers(workflow: Workflow) -> Mapping[str, Any]:
    """The key `on`, which YAML 1.1 reads as true."""
    parsed: Mapping[str, Any] = workflow[True]
    return parsed


def steps(workflow: Workflow) -> Iterator[Mapping[str, Any]]:
    for job in workflow["jobs"].values():
        yield from job["steps"]


def test_every_action_is_pinned_by_commit_and_all_by_the_same() -> None:
    text = "".join((FOLDER / name).read_text() for name in NAMES)
    lines = [line for line in text.splitlines() if "uses:" in line]
    assert [line for line in lines if not _PIN.search(line)] == []
    pins = {match.groups() for match in _PIN.finditer(text)}
    actions = {action for action, _, _ in pins}
    assert actions == {"actions/checkout", "actions/setup-python", "actions/upload-artifact"}
    assert len(pins) == len(actions)


@pytest.mark.parametrize("name", NAMES)
def test_jobs_may_read_only_are_limited_and_keep_no_token(name: str) -> None:
    workflow = load(name)
    assert workflow["permissions"] == {}
    assert workflow["concurrency"]["group"]
    for job in workflow["jobs"].values():
        assert job["permissions"] == {"contents": "read"}
        assert 0 < job["timeout-minutes"] <= 360
        (checkout,) = [s for s in job["steps"] if "actions/checkout@" in str(s.get("uses"))]
        assert checkout["with"]["persist-credentials"] is False


@pytest.mark.parametrize("name", NAMES)
def test_scripts_are_shell_and_no_expression_enters_one(name: str) -> None:
    for script in filter(None, (step.get("run") for step in steps(load(name)))):
        assert "${{" not in script
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_secrets_are_seen_by_one_step_only() -> None:
    names = {"HF_TOKEN", "ENGINESMITH_SIGNING_KEY_PEM"}
    text = "".join((FOLDER / name).read_text() for name in NAMES)
    assert text.count("secrets.") == len(names)
    (step,) = [step for step in steps(load("engine.yml")) if names & set(step.get("env", {}))]
    assert step["id"] == "engine"
    assert names <= set(step["env"])


@pytest.mark.parametrize("name", ["engine.yml", "rehearse-and-rtx.yml"])
def test_models_are_recipes(name: str) -> None:
    recipes = {path.stem for path in Path("recipes").glob("*.yaml")}
    workflow = load(name)
    if name == "engine.yml":
        field = triggers(workflow)["workflow_dispatch"]["inputs"]["model"]
        assert field["type"] == "choice"
        models = field["options"]
    else:
        models = workflow["jobs"]["rehearse"]["strategy"]["matrix"]["model"]
    assert set(models) <= recipes
    # On the runner with the build image: what TensorRT-LLM compiles.
    own = {"smollm2", "smollm2-vllm", *NOT_FOR_TRTLLM} if name == "engine.yml" else set()
    assert recipes - set(models) == own


@pytest.mark.parametrize("name", NAMES)
def test_make_targets_exist(name: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", Path("Makefile").read_text(), re.MULTILINE))
    used: set[str] = set()
    workflow = load(name)
    for step in steps(workflow):
        used.update(re.findall(r"\bmake ([a-z][a-z-]*)", step.get("run", "")))
    for job in workflow["jobs"].values():
        for value in job.get("strategy", {}).get("matrix", {}).get("targets", []):
            used.update(value.split())
    assert used
    assert used <= targets


def test_outputs_that_the_workflows_read_are_those_that_a_run_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.outcome import append_github_output

    output = tmp_path / "output"
    monkeypatch.setenv("GITHUB_OUTPUT", str(output))
    append_github_output({})
    written = {line.partition("<<")[0] for line in output.read_text().splitlines()}
    text = "".join((FOLDER / name).read_text() for name in NAMES)
    read = set(re.findall(r"steps\.engine\.outputs\.(\w+)", text))
    assert {"exit_code", "verdict", "reference", "digest"} <= read <= written
