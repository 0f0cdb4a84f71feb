"""The page's sections on answers: the chat probe, and tasks of the lm-eval harness."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.acceptance.page.markup import (
    Html,
    number,
    section,
    table,
    tag,
    with_small,
)
from pipeline.acceptance.page.sections import NOTHING, mark

_LONGEST = 300
"""Characters of an answer that the page shows; `report.json` has all of it."""


def chat(report: Mapping[str, Any]) -> Html:
    """Whether the engine ends its answers where the source does."""
    found = report.get("chat")
    if not found or "not_run" in found:
        return NOTHING
    asked = len(found["answers"])
    level = found["level"]
    rows = [
        (name, pairs["source"], pairs["engine"], f"{pairs['lost']} lost, {pairs['gained']} gained",
         f"{pairs['p_value']:.3g}", mark(pairs["p_value"] >= level))
        for name, pairs in (
            ("ended by themselves", found["stopped"]), ("had any text", found["not_empty"]),
        )
    ]  # fmt: skip
    missing = found["eos"]["missing"]
    held: list[tuple[str, object, bool]] = [
        ("template gives the same tokens", len(found["template_differs"]) or "of all prompts",
         not found["template_differs"]),
        ("end-of-sequence ids of the source", missing or found["eos"]["engine"], not missing),
        ("answers without one inside", len(found["eos_inside"]) or "all", not found["eos_inside"]),
        ("ends at an id that it is told", {True: "no", False: "yes", None: "not tried"}[
            found["stop_id_ignored"]], not found["stop_id_ignored"]),
    ]  # fmt: skip
    lead = (
        f"{asked} short conversations through the chat template, greedily, at most "
        f"{found['max_new_tokens']} tokens each. A loss that chance alone would bring in fewer "
        f"than {level:.0%} of all probes is a regression."
    )
    answers = [
        (one["name"], _said(one["source"]), _said(one["engine"])) for one in found["answers"]
    ]
    return section(
        "Chat",
        table(("answers that", "source", "engine", "pairs", "p", "result"), rows),
        table(("what must hold", "found", "result"), [(n, str(v), mark(k)) for n, v, k in held]),
        tag(
            "details",
            tag("summary", "The answers"),
            table(("prompt", "source", "engine"), answers),
        ),
        lead=lead,
    )


def _said(one: Mapping[str, Any]) -> Html:
    text = str(one["text"])
    shown = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}\u2026"
    ending = "ended" if one["stopped"] else "cut off at the bound"
    return with_small(Html(tag("span", shown, dir="auto")), f"{one['tokens']} tokens, {ending}")


def lm_eval(report: Mapping[str, Any]) -> Html:
    """Figures of the harness, task by task, beside the source's."""
    found = report.get("lm_eval")
    if not found:
        return NOTHING
    rows = [
        (
            task,
            name,
            number(found["source"]["tasks"][task]["metrics"][name]["value"]),
            number(metric["value"]),
        )
        for task, result in found["engine"]["tasks"].items()
        for name, metric in result["metrics"].items()
    ]
    return section("lm-eval", table(("task", "metric", "source", "engine"), rows))
