"""Acceptance on a card, as far as it goes without one.

What runs is real: a tiny model, quantized by ModelOpt and executed as a simulation. Only where it
runs is pretended, by a runner that says `cuda` and by the conditions of a card.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.acceptance import measure as measuring
from pipeline.acceptance.acceptance import Acceptance, Subject
from pipeline.acceptance.card import HeldCard
from pipeline.acceptance.chat import ChatSettings
from pipeline.acceptance.report import write_report
from pipeline.acceptance.sustained import SustainedRun
from pipeline.core.cache import StageCache
from pipeline.core.errors import CorruptError
from pipeline.core.gpu import ComputeProcess, Conditions
from pipeline.core.values import Checkpoint, Engine, Report, Verdict
from pipeline.formats.checkpoint.compiler import CheckpointCompiler
from pipeline.formats.spec import format_spec
from pipeline.model.hf import load_tokenizer
from pipeline.plan import make_plan
from pipeline.plan.sizes import PlanRequest
from pipeline.quant.spec import quant_spec
from pipeline.runners.runner import Device, Session
from pipeline.runners.transformers import TransformersSession
from pipeline.runners.workload import Lengths, Workload, eos_ids
from tests import stand_in_card
from tests.acceptance import test_conditions
from tests.quant.tiny_quantized import ADA, RepeatedText, shape_of, tiny_checkpoint

QUIET = dataclasses.replace(test_conditions.QUIET, gpu="NVIDIA Ada", sm=89)
LOAD = Workload(name="b2", batch=2, isl=8, osl=3, min_output_tokens_per_s=0.1)


@dataclasses.dataclass(frozen=True)
class CardRunner(stand_in_card.CardRunner):
    """The stand-in, which may say that it is on a CPU, and compute what no engine does."""

    where: Device = "cuda"
    damage: Callable[[Any], None] | None = None

    @property
    def device(self) -> Device:
        return self.where

    @contextlib.contextmanager
    def open(self, engine: Engine) -> Iterator[Session]:
        with super().open(engine) as session:
            if self.damage:
                self.damage(getattr(session, "_model").model)  # noqa: B009 - no Session has it
            yield session


def no_number(model: Any) -> None:
    model.norm.weight.data[:] = float("nan")


def other_norm(model: Any) -> None:
    model.layers[0].input_layernorm.weight.data *= 3


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A tiny model gains nothing from more, and beside other tests they wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the cache: what source and checkpoint answer is asked once."""
    return tmp_path_factory.mktemp("root")


def asked(**changes: Any) -> Acceptance:
    given: dict[str, Any] = {
        "targets": (LOAD,), "text": RepeatedText(), "windows": 4, "reference_windows": 4,
        "window_tokens": 64, "max_perplexity_increase": 1000.0, "max_mean_kl_nats": 0.2,
        "min_top1_agreement": 0.0, "repeats": 2,
        "time_limit_s": 600.0, "seed": 0, "max_spread": 100.0,
    }  # fmt: skip
    return Acceptance(**{**given, **changes})


def subject(checkpoint: Checkpoint, root: Path, question: Acceptance, **changes: Any) -> Subject:
    compiler = CheckpointCompiler(
        max_batch_size=2, max_seq_len=128, max_num_tokens=256, kv_cache_dtype="bfloat16",
        runtime="vllm", runtime_version="0.24.0",
    )  # fmt: skip
    plan = make_plan(
        PlanRequest(
            name="tiny",
            shape=shape_of(checkpoint.weights),
            target=ADA,
            format=format_spec("checkpoint"),
            precision=quant_spec("fp8"),
            limits=compiler.limits,
            workloads=question.targets,
            runtime=compiler.pinned_runtime,
        )
    )
    given: dict[str, Any] = {
        "engine": compiler.compile(checkpoint, ADA, StageCache(root=root / "cache"), root),
        "package_digest": "d" * 64,
        "weights": checkpoint.weights,
        "checkpoint_dir": checkpoint.dir,
        "plan": plan,
        "runner": CardRunner(),
    }
    return Subject(**{**given, **changes})


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> list[Conditions]:
    """The states of the card before and after; tests change them."""
    states = [QUIET, QUIET]

    @contextlib.contextmanager
    def held() -> Iterator[HeldCard]:
        found = HeldCard(before=states[0])
        yield found
        found.after = states[1]

    monkeypatch.setattr(measuring, "held_card", held)
    return states


def measure(
    checkpoint: Checkpoint, root: Path, question: Acceptance, **changes: Any
) -> tuple[Report, Verdict]:
    return measuring.measure(
        question, subject(checkpoint, root, question, **changes), StageCache(root=root / "cache")
    )


def test_engine_that_ran_on_its_card_is_accepted_with_all_figures(
    checkpoint: Checkpoint, root: Path, card: list[Conditions]
) -> None:
    question = asked(
        chat=ChatSettings(prompts=8, max_new_tokens=4, min_source_stops=0),
        sustained=SustainedRun(minutes=0.02, max_throughput_drop=0.99),
    )
    report, verdict = measure(checkpoint, root, question)
    assert verdict.name == "accepted", verdict.findings
    assert report.conditions["card"] == "NVIDIA-Ada" == report.card
    assert report.conditions["before"]["driver"] == "580.1"
    assert [entry["workload"] for entry in report.speed] == ["b2"]
    assert report.speed[0]["min_output_tokens_per_s"] == 0.1
    assert report.physics["shares"][0]["name"] == "b2"
    assert report.chat["prompts"] > 0
    assert len(report.sustained["samples"]) > 10
    assert report.sustained["figures"]["throughput_drop"] < 0.99
    assert report.not_run == []
    assert report.quality["checkpoint_reference"]["judged"] is False  # it computes in 32 bit
    document = report.to_json(verdict)
    assert {"chat", "sustained", "physics"} <= set(document)


def test_share_of_the_ceiling_becomes_a_rate_of_this_card(
    checkpoint: Checkpoint, root: Path, card: list[Conditions]
) -> None:
    load = Workload(name="b2", batch=2, isl=8, osl=8, min_share_of_ceiling=0.5)
    question = asked(targets=(load,))
    report, verdict = measure(checkpoint, root, question)
    ceiling = subject(checkpoint, root, question).plan.workloads[0].ceiling
    assert report.speed[0]["min_output_tokens_per_s"] == pytest.approx(0.5 * ceiling)
    assert verdict.name == "rejected"  # a simulation is far below it


def test_another_card_measures_and_demands_nothing(
    checkpoint: Checkpoint, root: Path, card: list[Conditions]
) -> None:
    card[:] = [dataclasses.replace(QUIET, gpu="NVIDIA Hopper", sm=90)] * 2
    load = Workload(name="b2", batch=2, isl=8, osl=8, min_output_tokens_per_s=1e9)
    report, verdict = measure(checkpoint, root, asked(targets=(load,)))
    assert verdict.name == "checked"
    assert report.conditions["card"] == "NVIDIA-Hopper"
    assert report.speed[0]["min_output_tokens_per_s"] is None
    assert report.physics == {}
    assert report.not_run == ["NVIDIA-Ada: no such card here; speed and numerics on it"]


def test_another_process_on_the_card_makes_it_inconclusive(
    checkpoint: Checkpoint, root: Path, card: list[Conditions]
) -> None:
    stranger = ComputeProcess(pid=77, memory_bytes=1)
    card[1] = dataclasses.replace(QUIET, other_compute_processes=(stranger,))
    _, verdict = measure(checkpoint, root, asked())
    assert verdict.name == "inconclusive"
    assert any("pid 77" in finding.message for finding in verdict.findings)


def test_one_layer_with_a_wrong_scale_is_a_regression(
    checkpoint: Checkpoint, tmp_path: Path, card: list[Conditions]
) -> None:
    question = asked()
    good = subject(checkpoint, tmp_path, question)
    folder = tmp_path / "broken"
    folder.mkdir()
    for path in good.engine.dir.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight_scale"] *= 4
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    engine = dataclasses.replace(good.engine, dir=folder)
    _, verdict = measure(checkpoint, tmp_path, question, engine=engine)
    assert verdict.name == "regression"
    _, verdict = measure(checkpoint, tmp_path, question)
    assert verdict.name == "accepted", verdict.findings


def test_logits_that_are_no_numbers_are_an_error_and_no_verdict(
    checkpoint: Checkpoint, root: Path, card: list[Conditions]
) -> None:
    with pytest.raises(CorruptError, match="not finite"):
        measure(checkpoint, root, asked(), runner=CardRunner(damage=no_number))


def test_source_answers_are_kept_and_the_source_is_not_loaded_again(
    checkpoint: Checkpoint,
    tmp_path: Path,
    card: list[Conditions],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    question = asked(chat=ChatSettings(prompts=8, max_new_tokens=4, min_source_stops=0))
    first, _ = measure(checkpoint, tmp_path, question)

    def refuse(*_: object) -> TransformersSession:
        raise AssertionError("the source was loaded again")

    monkeypatch.setattr("pipeline.runners.transformers.open_source", refuse)
    second, _ = measure(checkpoint, tmp_path, question)
    assert second.quality["source_perplexity"] == first.quality["source_perplexity"]
    assert second.chat["answers"] == first.chat["answers"]


def test_a_cpu_is_measured_by_its_answers_alone(checkpoint: Checkpoint, root: Path) -> None:
    question = asked(sustained=SustainedRun(minutes=60.0))
    report, verdict = measure(checkpoint, root, question, runner=CardRunner(where="cpu"))
    assert verdict.name == "checked", verdict.findings
    assert report.speed == ()
    assert report.sustained == {}


def test_engine_source_and_checkpoint_stand_beside_each_other(
    checkpoint: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    report, verdict = measure(checkpoint, tmp_path, asked(), runner=CardRunner(where="cpu"))
    reference = report.quality["checkpoint_reference"]
    assert verdict.name == "checked"
    assert reference["judged"] is True
    for key in ("perplexity_change", "top1_agreement"):  # this engine is the simulation
        assert reference[key] == report.quality[key]
    assert reference["mean_kl_nats"]["value"] == pytest.approx(
        report.quality["mean_kl_nats"]["value"], abs=1e-4
    )
    assert abs(reference["engine"]["mean_kl_nats"]["value"]) < 1e-4
    assert reference["windows"] == 4
    again, _ = measure(checkpoint, tmp_path, asked(), runner=CardRunner(where="cpu"))
    assert again.quality["checkpoint_reference"] == reference
    assert [line for line in caplog.messages if line.startswith("reference-logits: done")][1:] == []


def test_runtime_that_computes_something_else_than_its_checkpoint_is_a_regression(
    checkpoint: Checkpoint, root: Path
) -> None:
    question = asked(max_mean_kl_nats=1000.0)
    _, verdict = measure(
        checkpoint, root, question, runner=CardRunner(where="cpu", damage=other_norm)
    )
    assert verdict.name == "regression"
    assert "its own checkpoint" in verdict.findings[0].message


def test_engine_without_a_checkpoint_at_hand_says_so(checkpoint: Checkpoint, root: Path) -> None:
    question = asked()
    given = subject(checkpoint, root, question)
    engine = dataclasses.replace(given.engine, format="trtrtx")
    report, _ = measure(
        checkpoint,
        root,
        question,
        engine=engine,
        checkpoint_dir=None,
        runner=CardRunner(where="cpu"),
    )
    assert "checkpoint_reference" not in report.quality
    assert (
        "the checkpoint itself: the package of a compiled engine has no checkpoint"
        in report.not_run
    )


def test_lengths_and_ends_of_single_requests_are_in_the_report(
    checkpoint: Checkpoint, tmp_path: Path, card: list[Conditions]
) -> None:
    loads = (
        Workload(name="drawn", batch=2, isl=8, osl=9, requests=4, osl_distribution=Lengths(min=2)),
        Workload(name="ends", batch=2, isl=8, osl=9, ignore_eos=False),
    )
    report, verdict = measure(checkpoint, tmp_path, asked(targets=loads))
    assert verdict.name == "accepted", verdict.findings
    drawn, ends = report.speed
    wanted = loads[0].output_lengths(0)
    assert drawn["mean_osl"] == pytest.approx(sum(wanted) / 4, abs=1e-3)
    assert [run["output_lengths"] for run in drawn["runs"]] == [list(wanted)] * 2
    assert drawn["workload_digest"] == loads[0].digest
    assert eos_ids(load_tokenizer(checkpoint.dir))
    assert all(1 <= length <= 9 for length in ends["runs"][0]["output_lengths"])
    assert [share["name"] for share in report.physics["shares"]] == ["drawn", "ends"]
    files = write_report(report, verdict, tmp_path)
    assert json.loads(files["report.json"].read_text())["speed"][0]["load"] == loads[0].load
