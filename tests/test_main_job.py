"""The main job on real weights, through the command that users type."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline.acceptance.quality import log_softmax
from pipeline.cache import cache_root
from pipeline.runners.session import Session
from pipeline.runners.transformers import TransformersSession

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def enginesmith(work: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *words],
        cwd=work,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("work")
    done = enginesmith(work, "build", "smollm2")
    assert done.returncode == 0, done.stderr
    return work


def test_quality_is_within_one_percent_and_the_verdict_is_checked(built: Path) -> None:
    verdict = json.loads((built / "artifacts/.runs/latest/verdict.json").read_text())
    assert verdict["verdict"] == "checked"
    report = json.loads(Path(verdict["report"]).read_text())
    assert report["quality"]["tokens"] >= 8192
    assert report["quality"]["perplexity_change"]["value"] <= 0.01
    assert report["checks"]["fp8_plan"]["fp8_linears"] == 78
    assert "RTX-4090" in report["not_run"][0]
    print(json.dumps({"quality": report["quality"], "speed": report["speed"]}, indent=1))


def test_second_time_takes_the_package_in_five_seconds(built: Path) -> None:
    started = time.monotonic()
    done = enginesmith(built, "build", "smollm2")
    assert done.returncode == 0
    assert "Taken" in done.stdout
    assert time.monotonic() - started <= 5.0


def test_package_answers_and_says_what_answers(built: Path) -> None:
    done = enginesmith(built, "generate", "smollm2:candidate", "What is the capital of France?")
    assert "Paris" in done.stdout
    assert "CPU twin" in done.stderr


def test_graph_differs_from_the_simulation_no_more_than_the_simulation_from_itself(
    built: Path,
) -> None:
    from pipeline.convert.simulate import load_simulation
    from pipeline.hf import load_tokenizer
    from pipeline.runners.onnxruntime import OnnxRuntimeGraph, OnnxRuntimeSession
    from pipeline.text.topics import PydocTopics
    from pipeline.text.windows import pack_windows

    newest = max(
        (cache_root() / "stages" / "convert").glob("*/cpu.onnx"), key=lambda p: p.stat().st_mtime
    )
    record = json.loads((newest.parent / "stage.json").read_text())
    checkpoint = next(
        path.parent
        for path in (cache_root() / "stages" / "quantize").glob("*/stage.json")
        if json.loads(path.read_text())["digest"] == record["inputs"]["checkpoint"]
    )
    windows = pack_windows(
        PydocTopics(part="judge").documents(),
        load_tokenizer(checkpoint),
        seq_len=256,
        count=8,
        seed=None,
    )
    simulation = TransformersSession(load_simulation(checkpoint))
    contenders: dict[str, Session] = {
        "graph": OnnxRuntimeSession(OnnxRuntimeGraph(newest)),
        "float64": TransformersSession(load_simulation(checkpoint, accumulate="float64")),
    }
    kl: dict[str, list[float]] = {name: [] for name in contenders}
    agree: dict[str, list[float]] = {name: [] for name in contenders}
    nll: dict[str, list[float]] = {name: [] for name in (*contenders, "simulation")}
    for window in windows.tolist():
        base = log_softmax(simulation.logits(window)[:-1])
        rows = np.arange(len(window) - 1), np.array(window[1:])
        nll["simulation"].append(float(-base[rows].mean()))
        for name, session in contenders.items():
            other = log_softmax(session.logits(window)[:-1])
            kl[name].append(float((np.exp(base) * (base - other)).sum(-1).mean()))
            agree[name].append(float((base.argmax(-1) == other.argmax(-1)).mean()))
            nll[name].append(float(-other[rows].mean()))
    figures = {
        name: (np.mean(kl[name]), np.mean(agree[name]), math.exp(np.mean(nll[name])))
        for name in contenders
    }
    print("KL, top-1 agreement, perplexity against the simulation:", figures)
    # Two draws of the same noise: 1.5 x and two points are their spread over 2,040 positions.
    assert figures["graph"][0] <= 1.5 * figures["float64"][0] + 0.001
    assert figures["graph"][1] >= figures["float64"][1] - 0.02
    change = math.exp(np.mean(nll["graph"]) - np.mean(nll["simulation"])) - 1
    assert abs(change) <= 0.01
