"""The client is light: what `enginesmith pull` loads, of our own code and of others'."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pipeline
from pipeline.registry.reference import reference_of
from pipeline.registry.stores.publication import WritableStore
from tests.registry.stores.conftest import (
    folder_store,
    memory_oci,
    memory_oci_store,
    memory_s3,
    memory_s3_store,
)
from tests.registry.team import RUNTIME, Team

__all__ = ["folder_store", "memory_oci", "memory_oci_store", "memory_s3", "memory_s3_store"]

ROOT = Path(pipeline.__file__).parents[1]
_HEAVY = {"torch", "transformers", "modelopt", "onnx", "onnxruntime", "numpy", "hydra", "omegaconf"}
_MOST_LINES = 6_000

_SCRIPT = """
import json, sys
from pathlib import Path
from pipeline.cli import main
assert main() == 0
ours = [one for name, one in sys.modules.items() if name.split(".")[0] == "pipeline"]
lines = {one.__name__: len(Path(one.__file__).read_text().splitlines()) for one in ours}
print(json.dumps([lines, sorted(set(sys.modules))]))
"""


@pytest.mark.parametrize("kind", ["folder", "memory_s3", "memory_oci"])
def test_a_pull_loads_little_of_our_code_and_nothing_of_the_builder(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    store: WritableStore = request.getfixturevalue(f"{kind}_store")
    team = Team(dir=tmp_path / "team", store=store)
    team.dir.mkdir()
    reference = reference_of(team.publish(b"plan", "accepted"))
    arguments = ["pull", str(reference), "--to", str(tmp_path / "to"), "--registry", store.url]
    arguments += ["--gpu", "rtx4090", "--runtime", "==".join(RUNTIME)]
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, *arguments, "--policy", str(team.policy_file())],
        cwd=ROOT, env={**os.environ, "ENGINESMITH_CACHE": str(tmp_path / "cache")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines, modules = json.loads(done.stdout.splitlines()[-1])
    assert not _HEAVY & set(modules)
    assert sum(lines.values()) <= _MOST_LINES, lines
