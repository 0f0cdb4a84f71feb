"""The client is light: what it imports, and how much of our own code a pull loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import pipeline

ROOT = Path(pipeline.__file__).parents[1]
_HEAVY = {"torch", "transformers", "modelopt", "onnx", "onnxruntime", "numpy", "hydra", "omegaconf"}
_STORES = {
    "folder": ["pipeline.registry.stores.folder"],
    "s3": ["pipeline.registry.stores.s3"],
    "oci": ["pipeline.registry.stores.oci.registry", "pipeline.registry.stores.oci.reading"],
}
_MOST_LINES = {"folder": 4750, "s3": 5400, "oci": 5800}
"""What it is today, so that it grows no more."""

_SCRIPT = """
import importlib, json, sys
from pathlib import Path
import pipeline.registry.client.pull
for name in {modules!r}:
    importlib.import_module(name)
ours = {{name: module for name, module in sys.modules.items() if name.split(".")[0] == "pipeline"}}
lines = sum(len(Path(one.__file__).read_text().splitlines()) for one in ours.values())
print(json.dumps([lines, sorted(set(sys.modules)), sorted(ours)]))
"""


@pytest.mark.parametrize("store", _STORES)
def test_a_pull_loads_little_of_our_code_and_nothing_of_the_builder(store: str) -> None:
    script = _SCRIPT.format(modules=_STORES[store])
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines, modules, ours = json.loads(done.stdout)
    assert not _HEAVY & set(modules)
    assert lines <= _MOST_LINES[store], ours
    others = {"s3": "boto3", "oci": "urllib3"}
    for other, library in others.items():
        assert store == other or store == "s3" or library not in modules
