"""The page for people: complete, honest about what was not run, and safe to open."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any, get_args

import pytest

from pipeline.acceptance.report import render_page, write_report
from pipeline.core.published import VerdictName
from pipeline.core.values import Finding, Report, Verdict
from tests.acceptance.questions import acceptance
from tests.acceptance.report_pages import LIMITS, MANIFEST, PLAN, Page, everything, on_card, report

EVIL = '</style></pre><script>alert(1)</script><img src=x onerror="a()">\'& {x} $\\frac$ %s \u202e'


def poisoned(value: Any) -> Any:
    """Every text replaced, but those that the page's own code reads."""
    if isinstance(value, dict):
        return {key: poisoned(item) for key, item in value.items()}
    if isinstance(value, list):
        return [poisoned(item) for item in value]
    return EVIL if isinstance(value, str) else value


@pytest.mark.parametrize("name", get_args(VerdictName))
def test_every_verdict_comes_first_in_words_and_colour(name: str) -> None:
    page = Page(render_page(report(verdict=name), manifest=MANIFEST))
    (first, *_) = re.findall(
        r'<section class="verdict (\w+)"[^>]*>(.*?)</section>', page.source, re.S
    )
    assert f"<strong>{name}</strong><p>" in first[1]
    assert "NVIDIA GeForce RTX 4090" in page.text
    passing = {"accepted": "good", "checked": "checked", "compiled": "plain", "measured": "plain"}
    assert first[0] == passing.get(name, "warn" if name == "inconclusive" else "bad")
    assert page.source.index("<section") == page.source.index('<section class="verdict')


@pytest.mark.parametrize("url", ["s3://bucket/engines", "/srv/our engines"])
def test_the_next_command_names_the_registry_unless_it_is_the_default(url: str) -> None:
    def shown(registry: str) -> str:
        return Page(render_page(report(), reference="tiny:1", registry=registry)).text

    assert f"enginesmith accept tiny:1 --registry {shlex.quote(url)} on a machine" in shown(url)
    assert "enginesmith accept tiny:1 on a machine" in shown("artifacts")


def test_what_was_not_run_follows_the_verdict_and_is_not_repeated() -> None:
    page = Page(render_page(report()))
    assert re.findall("<h2>(.*?)</h2>", page.source)[0] == "Not run"
    assert page.text.count("FP8 KV cache: kept in float32 here") == 1
    assert "<h2>Not run</h2>" not in render_page(report(not_run=[], findings=[]))


def test_rates_of_another_machine_are_not_held_against_the_card() -> None:
    page = Page(render_page(report(), plan=PLAN))
    row = page.row("Targets on the card", "b1")
    assert row == "b1 batch 1 · 128 + 256 tokens 321.0 not run - 642.0 bound by memory 50% -"
    assert "Nothing was measured on this card." in page.text
    assert "It says nothing about the speed on NVIDIA-GeForce-RTX-4090." in page.text


def test_target_is_met_at_the_exact_rate_and_missed_below() -> None:
    page = Page(render_page(on_card(), plan=PLAN))
    assert "321.0 321.0 met" in page.row("Targets on the card", "b1")
    assert page.row("Targets on the card", "b1").endswith("50% 50%")
    assert "2,001 2,000 missed" in page.row("Targets on the card", "b8")
    assert "Nothing was measured" not in page.text


def test_quality_has_intervals_and_limits() -> None:
    page = Page(render_page(report(), limits=LIMITS))
    assert page.row("Quality", "change of perplexity") == (
        "change of perplexity +0.50% +0.40% to +0.60% at most +1.00% met"
    )
    assert page.row("Quality", "same most likely token").endswith("at least 85.00% met")
    strict = acceptance(
        max_perplexity_increase=0.004, max_mean_kl_nats=0.03, min_top1_agreement=0.91
    )
    assert Page(render_page(report(), limits=strict)).text.count("missed") == 3
    assert "met" not in Page(render_page(report())).row("Quality", "change of perplexity")


def test_nothing_is_loaded_and_no_script_can_run() -> None:
    page = Page(render_page(everything(), manifest=MANIFEST, plan=PLAN, limits=LIMITS))
    assert not {"script", "link", "img", "iframe", "object", "a"} & set(page.elements)
    for _, name, value in page.attributes:
        assert name not in {"src", "srcset", "data", "action"}
        assert not name.startswith("on")
        if name.endswith("href"):
            assert value.startswith("#")
    assert "@import" not in page.source
    assert set(re.findall(r"url\(([^)]?)", page.source)) <= {"#"}
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


@pytest.mark.parametrize("build", [report, everything])
def test_hostile_text_is_shown_and_never_markup(build: Any) -> None:
    bad = {**poisoned(build()), "verdict": "checked", EVIL: EVIL}
    bad["findings"] = [{"kind": EVIL, "message": EVIL}]
    bad["conditions"] = {**bad["conditions"], EVIL: EVIL, "deep": {EVIL: {EVIL: [EVIL, None]}}}
    bad["checks"] = {EVIL: {EVIL: EVIL}, "network": {"layer_kinds": {EVIL: 1}}}
    plan = poisoned(PLAN)
    page = Page(render_page(bad, manifest=poisoned(MANIFEST), plan=plan, limits=LIMITS))
    assert not {"script", "img"} & set(page.elements)
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    assert page.elements["style"] == 1 + page.elements["svg"]
    assert page.text.count("<script>alert(1)</script>") > 20
    clean = Page(render_page(build(), manifest=MANIFEST, plan=PLAN, limits=LIMITS))
    assert page.elements["h2"] <= clean.elements["h2"] + 1  # findings


def test_characters_that_no_page_may_have_are_replaced() -> None:
    bad = report()
    bad["findings"][0]["message"] = "a\x00b\x1b[31mc\ud800d\x85e\ttab\nline"
    page = render_page(bad)
    assert "a\ufffdb\ufffd[31mc\ufffdd\ufffde\ttab\nline" in page
    page.encode()


def test_figures_that_are_no_numbers_do_not_stop_the_page() -> None:
    odd = everything()
    odd["speed"][0] |= {"output_tokens_per_s": 0.0, "samples": [0.0, 0.0], "ttft_ms": float("nan")}
    odd["quality"]["perplexity_change"] = {"value": float("inf"), "low": 0.0, "high": float("nan")}
    Page(render_page(odd, plan=PLAN, limits=LIMITS))


def test_page_lies_beside_the_reports_for_programs(tmp_path: Path) -> None:
    subject = Report(
        digest="d" * 64, card="CARD", conditions={"device": "cpu"}, speed=[], quality={},
        not_run=["all of it"], checks={},
    )  # fmt: skip
    verdict = Verdict(name="rejected", findings=(Finding("rejected", "b1: slow"),))
    files = write_report(subject, verdict, tmp_path, manifest=MANIFEST, plan=PLAN, limits=LIMITS)
    assert sorted(files) == ["junit.xml", "report.html", "report.json"]
    assert all(path == tmp_path / name for name, path in files.items())
    assert json.loads(files["report.json"].read_text())["verdict"] == "rejected"
    page = Page(files["report.html"].read_text())
    assert "b1: slow" in page.text
    assert "all of it" in page.text
    assert "<h1>tiny</h1>" in page.source
