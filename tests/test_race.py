"""`enginesmith race`: on a CPU with the real runtimes, on a card with a stand-in for vLLM."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.acceptance import card
from pipeline.core.errors import ConflictError, ExitCode, IncompatibleError, RecipeError
from pipeline.core.gpu import Conditions, conditions_of
from pipeline.race import RaceRequest, race
from tests.acceptance.test_conditions import nvml
from tests.tiny_recipe import Workplace, make_workplace

pytestmark = pytest.mark.slow

PACKAGES = Path(__file__).parent / "runners" / "vllm" / "fake_packages"
TINY = ("~compiler.opt_batch_size", "~compiler.max_prefill_batch_size")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return make_workplace(tmp_path_factory.mktemp("place"))


@pytest.fixture(autouse=True)
def _surroundings(place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ENGINESMITH_CACHE", str(place.cache))


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """A machine with the stand-in vLLM and a card; `processes` are strangers' on it."""
    machine = SimpleNamespace(processes=[], seen=tmp_path / "seen.jsonl")

    def read() -> Conditions:
        return conditions_of(
            nvml(
                DeviceGetName="NVIDIA H100 80GB HBM3",
                DeviceGetComputeRunningProcesses=machine.processes,
            ),
            0,
        )

    monkeypatch.syspath_prepend(str(PACKAGES))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(PACKAGES), str(Path.cwd())]))
    monkeypatch.setenv("FAKE_VLLM", "")
    monkeypatch.setenv("FAKE_VLLM_SEEN", str(machine.seen))
    monkeypatch.setattr(card, "read_conditions", read)
    monkeypatch.setattr(card, "_SETTLE_S", 0.0)
    monkeypatch.setattr("pipeline.runners.vllm.read_conditions", read)
    return machine


def request(place: Workplace, **more: Any) -> RaceRequest:
    asked: dict[str, Any] = {
        "recipe": "tiny",
        "overrides": (*TINY, "acceptance.max_spread=1000.0"),
        "only": ("vllm-bf16", "vllm-fp8"),
        "batches": (1, 2),
        "isl": 8,
        "osl": 4,
        "rounds": 3,
        "out": Path("race"),
        "config_dir": place.recipes,
        **more,
    }
    return RaceRequest(**asked)


def test_race_on_a_card_measures_each_peer_beside_the_engine(
    place: Workplace, h100: SimpleNamespace
) -> None:
    answer = race(request(place))
    report = json.loads(Path("race", "report.json").read_text())
    assert report == json.loads(json.dumps(answer.value))
    assert report["verdict"] == "measured"
    assert [entry["workload"] for entry in report["speed"]] == ["b1", "b2"]
    for entry in report["speed"]:
        assert list(entry["peers"]) == ["vllm-bf16", "vllm-fp8"]
        assert {peer["ratio"]["rounds"] for peer in entry["peers"].values()} == {3}
        assert len(entry["samples"]) == 6
    assert report["conditions"]["card"] == "NVIDIA-H100-80GB-HBM3"
    assert report["conditions"]["after"]["uuid"] == "GPU-1"
    assert "quality: a race measures speed only" in report["not_run"]
    page = Path("race", "report.html").read_text()
    assert "Its answers were not looked at" in page
    assert "vLLM, its online FP8" in page
    engine = next(place.cache.glob("stages/pack/*/engine"))
    seen = [json.loads(line) for line in h100.seen.read_text().splitlines()]
    source = str(place.root / "model")
    assert [one["model"] for one in seen] == [str(engine), source, source]
    assert [one["max_num_seqs"] for one in seen] == [2, 2, 2]
    assert [one["quantization"] for one in seen] == [None, None, "fp8"]
    assert {one["gpu_memory_utilization"] for one in seen} == {0.05}
    assert all(one["kv_cache_memory_bytes"] > 0 for one in seen)
    assert answer.exit_code is ExitCode.OK
    with pytest.raises(ConflictError, match="is not empty; name another folder with --out"):
        race(request(place))


def test_peer_that_does_not_load_fails_the_race_and_not_the_others(
    place: Workplace, h100: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM", "refuse-fp8")
    answer = race(request(place, batches=(1,)))
    (entry,) = answer.value["speed"]
    assert list(entry["peers"]) == ["vllm-bf16"]
    assert "no kernel for this quantization" in answer.message
    assert answer.exit_code is ExitCode.FAILED


def test_race_on_random_weights_leaves_the_source_alone(
    place: Workplace, h100: SimpleNamespace
) -> None:
    race(request(place, only=("vllm-bf16",), batches=(1,), rounds=1, random_weights=True))
    seen = [json.loads(line) for line in h100.seen.read_text().splitlines()]
    assert Path(seen[-1]["model"]).parent == place.cache / "random-weights"


def test_race_on_a_cpu_is_between_the_real_runtimes(place: Workplace) -> None:
    asked = request(place, cpu=True, overrides=("acceptance.max_spread=1000.0",), only=())
    answer = race(asked)
    assert answer.value["verdict"] == "measured"
    for entry in answer.value["speed"]:
        (peer,) = entry["peers"].values()
        assert peer["label"] == "Hugging Face generate, float32"
        assert peer["ratio"]["rounds"] == 3
        assert peer["ratio"]["low"] <= peer["ratio"]["median"] <= peer["ratio"]["high"]
    assert answer.value["conditions"]["runner"] == "onnxruntime"
    assert answer.exit_code is ExitCode.OK


@pytest.mark.parametrize(
    ("more", "shown"),
    [
        ({"only": ("vllm-int4",)}, "there are vllm-bf16, vllm-fp8, transformers"),
        ({"cpu": True, "overrides": (), "only": ("vllm-fp8",)}, "there are transformers"),
        ({"batches": (3,)}, r"b3 exceeds compiler.max_batch_size \(2\)"),
        ({"isl": 125}, r"--isl \+ --osl \(129\) exceeds compiler.max_seq_len \(128\)"),
        ({"overrides": ("compiler=trtllm",)}, "a race chooses the compiler"),
    ],
)
def test_wrong_command_line_is_refused_before_anything_is_made(
    place: Workplace, more: dict[str, Any], shown: str
) -> None:
    with pytest.raises(RecipeError, match=shown):
        race(request(place, **more))
    assert not Path("race").exists()


def test_machine_without_vllm_is_refused_with_the_way_on(place: Workplace) -> None:
    with pytest.raises(IncompatibleError, match="on a GPU, or with --cpu: runner=vllm needs"):
        race(request(place))
