"""Acceptance of loads beyond equal batches, and of a simulation on a card, end to end.

As in `test_measure`: what runs is real, only where it runs is pretended.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from pipeline.acceptance.report import write_report
from pipeline.acceptance.sustained import SustainedRun
from pipeline.core.gpu import Conditions
from pipeline.core.values import Checkpoint
from pipeline.model.hf import load_tokenizer
from pipeline.runners.prompts import eos_ids
from pipeline.runners.runner import BATCHES, Ability
from pipeline.runners.workload import Lengths, Workload
from tests.acceptance.test_measure import (
    LOAD,
    CardRunner,
    asked,
    card,
    checkpoint,
    measure,
    one_thread,
)

__all__ = ["card", "checkpoint", "one_thread"]  # fixtures


@dataclasses.dataclass(frozen=True)
class SimulatingRunner(CardRunner):
    """Says that it only simulates."""

    @property
    def name(self) -> str:
        return "transformers"

    @property
    def abilities(self) -> frozenset[Ability]:
        return BATCHES | {"clear_cache"}


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


@pytest.mark.slow
def test_simulation_on_the_engines_own_card_is_no_run_of_the_engine(
    checkpoint: Checkpoint, tmp_path: Path, card: list[Conditions]
) -> None:
    question = asked(
        targets=(dataclasses.replace(LOAD, min_output_tokens_per_s=1e9),),
        sustained=SustainedRun(minutes=0.12, max_throughput_drop=0.99, clear_cache=True),
    )
    report, verdict = measure(checkpoint, tmp_path, question, runner=SimulatingRunner())
    assert verdict.name == "checked", verdict.findings
    assert report.speed == ()
    assert report.physics == {}
    assert report.not_run[0].startswith("NVIDIA-Ada: only a simulation ran on it")
    assert "speed: runner transformers only simulates the engine" in report.not_run
    cleared = report.sustained["cache_cleared"]
    assert len(cleared["samples"]) > 1
    assert cleared["effect"]["throughput_change"] is not None
    assert cleared["effect"]["memory_change_bytes"] is None  # no card here, whose memory is read
