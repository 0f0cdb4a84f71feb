"""The command as a whole: real artifact, a stand-in for vLLM, and a card that NVML would show."""

from __future__ import annotations

import json
import shlex
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from pipeline.acceptance import card
from pipeline.acceptance.race import prepare as preparation
from pipeline.acceptance.race.command import run_race_command
from pipeline.acceptance.race.journal import JOURNAL
from pipeline.acceptance.race.prepare import (
    PreparationError,
    make_artifact,
    on_random_weights,
    prepare,
)
from pipeline.acceptance.race.request import Request, compose
from pipeline.commands.answer import tell
from pipeline.commands.race import race
from pipeline.core.errors import (
    ConflictError,
    ExitCode,
    IncompatibleError,
    RecipeError,
)
from pipeline.core.nvml import Conditions, conditions_of
from pipeline.runners.vllm import runner as vllm_runner
from tests.acceptance.test_conditions import nvml
from tests.tiny_recipe import Workplace, make_workplace

pytestmark = pytest.mark.slow

PACKAGES = Path(__file__).parents[2] / "runners" / "vllm" / "fake_packages"
TINY = ("~compiler.opt_batch_size", "~compiler.max_prefill_batch_size")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return make_workplace(tmp_path_factory.mktemp("place"))


@pytest.fixture(autouse=True)
def _surroundings(place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ENGINESMITH_CACHE", str(place.cache))
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(tempfile, "tempdir", None)


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
    monkeypatch.setenv("PYTHONPATH", str(PACKAGES))
    monkeypatch.setenv("FAKE_VLLM_SEEN", str(machine.seen))
    monkeypatch.setattr(card, "read_conditions", read)
    monkeypatch.setattr(card, "_SETTLE_S", 0.0)
    monkeypatch.setattr(vllm_runner, "read_conditions", read)
    return machine


def request(place: Workplace, **more: Any) -> Request:
    asked: dict[str, Any] = {
        "recipe": "tiny",
        "overrides": TINY,
        "only": ("vllm-bf16", "vllm-fp8"),
        "batches": (1, 2),
        "isl": 8,
        "osl": 4,
        "rounds": 3,
        "out": Path("race"),
        "config_dir": place.recipes,
        **more,
    }
    return Request(**asked)


def raced(asked: Request) -> ExitCode:
    """Race, tell people, and the exit code."""
    answer = run_race_command(asked)
    tell(answer)
    return answer.exit_code


def report(folder: str = "race") -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((Path(folder) / "race.json").read_text())
    return loaded


def test_a_race_is_run_reported_and_continued(
    place: Workplace, h100: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert raced(request(place)) is ExitCode.OK
    found = report()
    assert found["verdict"] == "measured"
    assert [pair["state"] for pair in found["pairs"]] == ["complete"] * 2
    ratios = [row["ratio"] for pair in found["pairs"] for row in pair["workloads"]]
    assert [ratio["rounds"] for ratio in ratios] == [3] * 4
    assert found["card"] == "NVIDIA-H100-80GB-HBM3"
    assert found["statement"] == "measured on NVIDIA H100 80GB HBM3; says nothing about rtx4090"
    assert [row["workload"] for row in found["ceilings"]] == ["b1", "b2"]  # conf/target/h100.yaml
    assert found["commands"][0]["before"]["driver"] == "580.1"
    assert found["commands"][0]["after"]["uuid"] == "GPU-1"
    engine = next(place.cache.glob("stages/pack/*/engine"))
    told = [json.loads(line) for line in h100.seen.read_text().splitlines()]
    source = str(place.root / "model")
    assert [one["model"] for one in told] == [str(engine), source, source]
    assert [one["max_num_seqs"] for one in told] == [2, 2, 2]
    shown = capsys.readouterr().out
    assert "ours / peer" in shown
    assert "trtllm did not run: TensorRT-LLM is not installed here" in shown
    for name in ("race.html", "throughput.svg", "logs/ours-1.log", "logs/vllm-fp8-1.log"):
        assert (Path("race") / name).is_file()

    with pytest.raises(ConflictError, match="continue it with --resume"):
        run_race_command(request(place))
    before = (Path("race") / JOURNAL).read_bytes()
    assert raced(request(place, resume=True)) is ExitCode.OK
    assert len(h100.seen.read_text().splitlines()) == 3  # nothing was loaded
    assert (Path("race") / JOURNAL).read_bytes().startswith(before)

    # The device of this peer is not there; the figures of the others stay.
    asked = request(place, resume=True, only=("transformers", "vllm-fp8-kv8"))
    assert raced(asked) is ExitCode.FAILED
    found = report()
    states = {pair["peer"]: pair["state"] for pair in found["pairs"]}
    assert states == {
        "vllm-bf16": "complete",
        "vllm-fp8": "complete",
        "transformers": "failed",
        "vllm-fp8-kv8": "complete",
    }
    assert "CUDA" in next(p for p in found["pairs"] if p["failure"])["failure"]["message"]
    with pytest.raises(ConflictError, match="holds another race: workloads was"):
        run_race_command(request(place, resume=True, osl=5))


def test_a_strangers_process_is_inconclusive_and_says_so(
    place: Workplace, h100: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    h100.processes = [SimpleNamespace(pid=77, usedGpuMemory=None)]
    asked = request(place, only=("vllm-bf16",), rounds=1)
    assert raced(asked) is ExitCode.NOT_ACCEPTED
    shown = capsys.readouterr()
    assert "this race is inconclusive" in shown.err
    assert "inconclusive: before the measurement other compute processes" in shown.out


def test_the_time_limit_leaves_a_command_that_goes_on(
    place: Workplace, h100: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = request(place, time_limit_s=1.0, only=("vllm-fp8",))
    assert raced(asked) is ExitCode.TRANSIENT
    assert "missing rounds: b1 3, b2 3" in capsys.readouterr().out
    words = shlex.split(report()["next_command"])
    assert words[:2] == ["enginesmith", "race"]
    app = typer.Typer()
    app.command()(race)
    unlimited = [word for word in words[2:] if word not in {"--time-limit-s", "1"}]
    assert CliRunner().invoke(app, unlimited).exit_code == 0
    assert report()["verdict"] == "measured"
    assert report()["next_command"] is None
    told = CliRunner().invoke(app, [*unlimited, "--json"])  # nothing is left to do
    assert json.loads(told.stdout) == {"schema": 1, "exit_code": 0, **report()}


def test_without_vllm_or_a_card_it_ends_at_once_and_leaves_nothing(place: Workplace) -> None:
    with pytest.raises(IncompatibleError, match="needs the package vllm"):
        run_race_command(request(place))
    assert not Path("race").exists()


def test_faults_of_the_command_line_are_told_together(place: Workplace) -> None:
    asked = request(place, only=("vllm-int4",), batches=(1, 64), isl=100, osl=100)
    with pytest.raises(RecipeError) as caught:
        run_race_command(asked)
    told = str(caught.value)
    assert "'vllm-int4' is no contender; there are vllm-bf16, vllm-fp8" in told
    assert "b64 exceeds compiler.max_batch_size (2)" in told
    assert "--isl + --osl (200) exceeds compiler.max_seq_len (128)" in told
    with pytest.raises(RecipeError, match="leave compiler out"):
        run_race_command(request(place, overrides=("compiler=trtrtx",)))


def test_the_default_batches_end_at_the_engines_limit(place: Workplace) -> None:
    from pipeline.acceptance.race.request import workloads_of

    asked = request(place, batches=())
    assert [load.name for load in workloads_of(asked, compose(asked))] == ["b1"]


def test_a_workload_that_is_misspelt_is_a_usage_error() -> None:
    app = typer.Typer()
    app.command()(race)
    done = CliRunner().invoke(app, ["tiny", "--workloads", "b1,x8"])
    assert isinstance(done.exception, RecipeError)
    assert "'x8' is no workload" in str(done.exception)


def test_random_weights_are_made_once_and_whole(
    place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = on_random_weights(compose(request(place)), tmp_path / "cache")
    folder = recipe.source.folder  # type: ignore[attr-defined]

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(preparation, "write_random_model", killed)
        with pytest.raises(KeyboardInterrupt):
            make_artifact(recipe, tmp_path / "cache", tmp_path)
    assert not folder.exists()
    made = make_artifact(recipe, tmp_path / "cache", tmp_path)
    assert made.weights.random
    assert made.engine.serve_args[-2:] == ("--kv-cache-dtype", "fp8")
    with monkeypatch.context() as patched:
        patched.setattr(preparation, "write_random_model", killed)
        again = make_artifact(recipe, tmp_path / "cache", tmp_path)
    assert again == made


def test_what_fails_while_the_artifact_is_made_keeps_its_exit_code(
    place: Workplace, tmp_path: Path
) -> None:
    asked = request(place, overrides=(*TINY, "source.path=/nowhere/at/all", "name=other"))
    with pytest.raises(PreparationError, match="/nowhere/at/all") as caught:
        prepare(compose(asked), tmp_path / "cache", tmp_path)
    assert caught.value.exit_code is ExitCode.NOT_FOUND
