"""The whole line on a CUDA device: real weights judged and refused; the race on a full shape.

`$ENGINESMITH_TEST_WEIGHTS` names a folder with SmolLM2's weights, for machines whose Transformers
cannot convert the embedded GGUF (5.17 cannot).
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from pipeline.accept import AcceptRequest as Request
from pipeline.accept import compose, same_weights, this_card
from pipeline.acceptance.acceptance import Subject
from pipeline.acceptance.measure import measure
from pipeline.build import plan_of
from pipeline.core.cache import StageCache
from pipeline.core.values import engine_of
from pipeline.registry.client.pull import PullRequest
from pipeline.registry.manifest import verify
from tests.tiny_recipe import ROOT, enginesmith

pytestmark = pytest.mark.gpu

# With an FP8 KV cache this model loses 3 % (docs/benchmarks.md).
CACHE = "compiler.kv_cache_dtype=bfloat16"
# One batch of this model takes half a second, which scatters; not every runner takes `requests`.
TARGET = (
    "acceptance.targets=[{name: gpu-b4, batch: 4, isl: 128, osl: 256, requests: 64, warm_ups: 2,"
    " min_output_tokens_per_s: 312.0}]"
)
QUICK = (
    "acceptance.windows=8",
    "acceptance.max_perplexity_increase=0.03",
    "acceptance.max_spread=0.3",
)


def own_weights() -> tuple[str, ...]:
    folder = os.environ.get("ENGINESMITH_TEST_WEIGHTS")
    if folder is None:
        return ()
    return ("source=local", f"source.path={folder}", "source.licence=Apache-2.0", "name=smollm2")


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return enginesmith(cwd, *arguments, PYTHONPATH=path, ENGINESMITH_CACHE=str(cwd / "cache"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with SmolLM2's checkpoint package, accepted on this card."""
    place = tmp_path_factory.mktemp("line")
    target = this_card().id
    keys = (
        "compiler=checkpoint",
        CACHE,
        "runner=vllm",
        f"target={target}",
        *own_weights(),
        *QUICK,
        TARGET,
    )
    done = run("build", "smollm2", *keys, cwd=place)
    assert done.returncode == 0, done.stderr
    return place


def package_of(place: Path) -> Path:
    (manifest,) = (place / "artifacts").glob("*/*/*/manifest.json")
    return manifest.parent


def test_real_weights_are_accepted_for_this_card(built: Path) -> None:
    verdict = json.loads((built / "artifacts/.runs/latest/verdict.json").read_text())
    report = json.loads(Path(verdict["report"]).read_text())
    assert verdict["verdict"] == "accepted"
    assert report["conditions"]["card"] == report["card"] == this_card().card
    assert report["chat"]["stopped"]["source"] >= 5
    assert report["speed"][0]["peak_memory_bytes"] > 0
    assert report["physics"]["bandwidth_bytes_per_s"] > 0


def test_one_layer_with_a_wrong_scale_is_a_regression(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENGINESMITH_CACHE", str(built / "cache"))
    package = verify(package_of(built))
    folder = tmp_path / "engine"
    shutil.copytree(package.engine_dir, folder)
    for path in folder.iterdir():
        path.chmod(0o644)
    (weights,) = folder.glob("*.safetensors")
    tensors = load_file(weights)
    scale = next(n for n in sorted(tensors) if n.endswith("mlp.gate_proj.weight_scale"))
    for name in (scale, scale.replace("gate_proj", "up_proj")):  # they share it
        tensors[name] *= 4
    save_file(tensors, weights, metadata={"format": "pt"})
    request = Request(wanted=PullRequest(reference=str(package.dir)), overrides=(
        *own_weights(), *QUICK, "acceptance.targets=[]", "acceptance.chat=null"))  # fmt: skip
    recipe: Any = compose(request, package, this_card()).value
    engine = engine_of(package)
    subject = Subject(
        engine=dataclasses.replace(engine, dir=folder),
        package_digest=package.digest,
        weights=same_weights(recipe, package),
        checkpoint_dir=None,
        plan=plan_of(recipe),
        runner=recipe.runner,
    )
    _, verdict = measure(recipe.acceptance, subject, StageCache(root=built / "cache"))
    assert verdict.name == "regression"


def test_full_shape_races_against_bfloat16(tmp_path: Path) -> None:
    done = run(
        *("race", "phi3", "--random-weights", "--only", "vllm-bf16", "--workloads", "b1"),
        *("--rounds", "2", "--out", str(tmp_path / "race")),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "race/report.json").read_text())
    assert report["verdict"] == "measured"
    (entry,) = report["speed"]
    assert entry["peers"]["vllm-bf16"]["ratio"]["rounds"] == 2
    assert report["conditions"]["card"] == this_card().card
