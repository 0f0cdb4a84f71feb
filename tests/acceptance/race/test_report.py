"""The report: what it says of complete, partial and failed pairs, and of the card."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.acceptance.race.command import exit_code
from pipeline.acceptance.race.page import render_page, write_report
from pipeline.acceptance.race.report import Context, report_of
from pipeline.acceptance.race.table import rates_table, ratio_table
from pipeline.core.errors import ExitCode
from pipeline.plan.ceilings import Roofline
from tests.acceptance.race.cpu_race import QUESTION

LINE = Roofline(
    bandwidth_bytes_per_s=3.35e12,
    step_weight_bytes=3_820_000_000,
    kv_bytes_per_token=196_608,
    windows=(None,),
    layer_s_per_token=4e-6,
    lm_head_s_per_token=2e-7,
)
ADA = Context(
    target="rtx4090", target_card="NVIDIA-GeForce-RTX-4090", next_command="race tiny --resume"
)
RATES = {"ours": {"b1": 350.0, "b2": 700.0}, "fast": {"b1": 250.0, "b2": 500.0}}


def command(number: int = 1, **asked: int) -> dict[str, Any]:
    names = ("ours", *asked)
    return {
        "kind": "command",
        "command": number,
        "at": "2026-11-25T12:00:00+00:00",
        "asked": asked,
        "contenders": {
            name: {"label": f"the {name}", "arguments": ["--model", "/m"], "memory_bytes": 1}
            for name in names
        },
        "tools": {"vllm": "0.24.0"},
        "before": {"gpu": "NVIDIA H100 80GB HBM3", "driver": "580.1"},
    }


def end(number: int = 1, *findings: dict[str, str]) -> dict[str, Any]:
    return {"kind": "end", "command": number, "after": {"gpu": "x"}, "findings": list(findings)}


def samples(
    peer: str, rounds: range, *, number: int = 1, scale: float = 1.0, loads: str = "b1 b2"
) -> list[dict[str, Any]]:
    return [
        {
            "kind": "sample",
            "command": number,
            "peer": peer,
            "workload": load,
            "round": index,
            "contender": name,
            "output_tokens": 100,
            "output_tokens_per_s": scale * RATES[kind][load] * (1 + 0.001 * index),
            "ttft_ms": 10.0,
            "itl_ms": 3.0,
            "energy_j": 50.0,
        }
        for index in rounds
        for load in loads.split()
        for name, kind in (("ours", "ours"), (peer, "fast"))
    ]


def test_a_complete_race_has_ratios_with_intervals_and_pooled_medians() -> None:
    events = [
        command(fast=5, other=3),
        *samples("fast", range(5)),
        *samples("other", range(3), scale=2.0),
        end(),
    ]
    report = report_of(QUESTION, events, ADA)
    assert report["verdict"] == "measured"
    assert report["next_command"] is None
    pair = report["pairs"][0]
    assert (pair["peer"], pair["state"], pair["rounds"]) == ("fast", "complete", 5)
    assert pair["workloads"][0]["ratio"] == {
        "median": 1.4,
        "low": 1.4,
        "high": 1.4,
        "level": 0.95,
        "rounds": 5,
    }
    assert pair["workloads"][1]["peer"] == [500.0, 500.5, 501.0, 501.5, 502.0]
    rates = {(row["contender"], row["workload"]): row for row in report["throughput"]}
    assert rates["ours", "b1"]["runs"] == 8  # of both pairs
    assert rates["fast", "b1"]["output_tokens_per_s"] == 250.5
    assert rates["fast", "b1"]["joules_per_token"] == 0.5
    assert exit_code(report, ("fast", "other")) is ExitCode.OK


def test_another_card_than_the_recipes_is_named_and_says_nothing_of_it() -> None:
    events = [command(fast=1), *samples("fast", range(1)), end()]
    report = report_of(QUESTION, events, ADA)
    assert not report["on_target"]
    wanted = "measured on NVIDIA H100 80GB HBM3; says nothing about rtx4090"
    assert report["statement"].startswith(wanted)
    own = report_of(QUESTION, events, Context(target="h100", target_card=QUESTION["gpu"]))
    assert own["on_target"]
    assert "says nothing" not in own["statement"]


def test_missing_rounds_and_failures_are_told_and_are_no_success() -> None:
    failure = {
        "kind": "failure",
        "command": 1,
        "peer": "bad",
        "contender": "bad",
        "message": "no kernel\n    its last words",
    }
    events = [
        command(fast=3, bad=3, none=3),
        *samples("fast", range(3), loads="b1"),
        *samples("fast", range(2), loads="b2"),
        failure,
        end(),
    ]
    report = report_of(QUESTION, events, ADA)
    states = {pair["peer"]: pair["state"] for pair in report["pairs"]}
    assert states == {"fast": "partial", "bad": "failed", "none": "missing"}
    assert report["verdict"] == "incomplete"
    assert report["next_command"] == "race tiny --resume"
    assert exit_code(report, ("fast",)) is ExitCode.TRANSIENT
    assert exit_code(report, ("none",)) is ExitCode.TRANSIENT
    assert exit_code(report, ("fast", "bad")) is ExitCode.FAILED
    assert exit_code(report, ("trtllm",)) is ExitCode.FAILED  # asked, and no pair at all
    page = render_page(report)
    assert "its last words" in page
    assert "missing rounds: b2 1" in page


def test_a_failure_that_a_later_command_made_good_is_forgotten() -> None:
    failure = {"kind": "failure", "command": 1, "peer": "fast", "contender": "ours", "message": "x"}
    events = [command(fast=1), failure, end(), command(2, fast=1)]
    events += [*samples("fast", range(1), number=2), end(2)]
    report = report_of(QUESTION, events, ADA)
    assert report["pairs"][0]["state"] == "complete"
    assert report["pairs"][0]["failure"] is None
    assert exit_code(report, ("fast",)) is ExitCode.OK


def test_a_strangers_process_makes_the_race_inconclusive() -> None:
    found = {"kind": "inconclusive", "message": "pid 77 was on the card"}
    events = [command(fast=1), *samples("fast", range(1)), end(1, found)]
    report = report_of(QUESTION, events, ADA)
    assert report["verdict"] == "inconclusive"
    assert exit_code(report, ("fast",)) is ExitCode.NOT_ACCEPTED
    idle = [command(fast=1), end(1, found), command(2, fast=1)]
    idle += [*samples("fast", range(1), number=2), end(2)]
    assert report_of(QUESTION, idle, ADA)["verdict"] == "measured"  # nothing was measured then


def test_a_command_that_was_killed_is_noted() -> None:
    events = [command(fast=1), *samples("fast", range(1))]
    (finding,) = report_of(QUESTION, events, ADA)["findings"]
    assert finding["kind"] == "note"
    assert "command 1 was stopped from outside" in finding["message"]


def test_a_rate_above_the_cards_ceiling_is_anomalous_and_the_ceiling_is_told() -> None:
    card = Context(target="h100", target_card=QUESTION["gpu"], roofline=LINE)
    events = [command(fast=1), *samples("fast", range(1)), end()]
    report = report_of(QUESTION, events, card)
    assert report["verdict"] == "measured"
    assert report["ceilings"][0]["output_tokens_per_s"] == pytest.approx(877, rel=0.01)
    assert report["ceilings"][0]["bound"] == "memory"
    events = [command(fast=1), *samples("fast", range(1), scale=3.0), end()]
    report = report_of(QUESTION, events, card)
    assert report["verdict"] == "anomalous"
    assert exit_code(report, ("fast",)) is ExitCode.NOT_ACCEPTED


class Balanced(HTMLParser):
    """Counts what is opened and closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in {"meta", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def whole_report() -> dict[str, Any]:
    events = [
        command(fast=5, other=3),
        *samples("fast", range(5)),
        *samples("other", range(3)),
        end(),
    ]
    events[0]["contenders"]["fast"]["label"] = "<b>fast</b> & $x$"
    return report_of(
        QUESTION, events, Context(target="x", target_card="X", roofline=LINE, not_raced={"t": "u"})
    )


def test_the_page_needs_nothing_from_outside_and_escapes_what_it_is_told() -> None:
    page = render_page(whole_report())
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert not re.search(r"(?:src|href)=\"(?!#)", page)
    assert "<b>fast" not in page
    assert "&lt;b&gt;fast&lt;/b&gt; &amp; $x$" in page
    assert page.count("<svg") == 2
    assert "#0a0b0" not in page  # every stand-in colour was replaced
    assert page.count("1.400 to 1.400") == 4
    assert "ceiling of the card" in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_a_peer_that_is_far_behind_does_not_press_the_others_flat() -> None:
    events = [command(fast=3, slow=3), *samples("fast", range(3)), end()]
    for sample in samples("slow", range(3)):
        behind = 0.1 if sample["contender"] == "slow" else 1.0
        rate = behind * sample["output_tokens_per_s"]
        events.append({**sample, "output_tokens_per_s": rate})
    page = render_page(report_of(QUESTION, events, ADA))
    assert "Too far away for this plot: the slow." in page
    assert page.count("14.000 to 14.000") == 2  # in the table it is


def test_the_files_are_written_and_the_same_report_gives_the_same_bytes(tmp_path: Path) -> None:
    report, written = whole_report(), []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_report(report, tmp_path / name)
        written.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert written[0] == written[1]
    assert set(written[0]) == {
        "race.json",
        "race.html",
        "throughput.svg",
        "throughput.png",
        "ratios.svg",
        "ratios.png",
    }
    assert json.loads(written[0]["race.json"]) == report
    assert written[0]["throughput.png"].startswith(b"\x89PNG")
    assert b"#0a0b0" not in written[0]["throughput.svg"]


def test_the_table_states_the_ratio_to_each_with_its_interval() -> None:
    screen = Console(file=StringIO(), width=160)
    report = whole_report()
    screen.print(rates_table(report))
    screen.print(ratio_table(report))
    assert isinstance(screen.file, StringIO)
    shown = screen.file.getvalue()
    assert shown.count("1.400 to 1.400") == 4
    assert "5 of 5" in shown
    assert "ceiling of the card" in shown
