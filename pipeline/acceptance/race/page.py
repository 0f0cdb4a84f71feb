"""The report in files: race.json, race.html, and the plots beside it.

race.html needs nothing from outside; it looks like the reports of acceptance, whose style sheet and
escaping it uses. Plots need matplotlib; without it the page has its tables only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

from pipeline.acceptance.page.charts import installed
from pipeline.acceptance.page.markup import (
    Html,
    facts,
    join,
    number,
    section,
    table,
    tag,
    with_small,
)
from pipeline.acceptance.race.chart import (
    inline_svg,
    png,
    ratio_figure,
    split_by_scale,
    svg,
    throughput_figure,
)
from pipeline.acceptance.race.contenders import OURS
from pipeline.acceptance.race.table import label_of, missing_text, ratio_parts

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_TONES = {"measured": "good", "incomplete": "warn", "inconclusive": "bad", "anomalous": "bad"}


def write_report(report: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """Write everything, each file in one step; name -> path."""
    written: dict[str, bytes] = {
        "race.json": (json.dumps(report, indent=1) + "\n").encode(),
        "race.html": render_page(report).encode(),
    }
    if installed() and report["throughput"]:
        for name, draw in (
            ("throughput", throughput_figure(report)),
            ("ratios", ratio_figure(report)),
        ):
            written[f"{name}.svg"] = svg(draw, name).encode()
            written[f"{name}.png"] = png(draw, name)
    for name, data in written.items():
        private = folder / f".{name}"
        private.write_bytes(data)
        private.replace(folder / name)
    return {"report": folder / "race.json", "page": folder / "race.html"}


def render_page(report: Mapping[str, Any]) -> str:
    """The report as one HTML page."""
    style = resources("pipeline.acceptance.page").joinpath("page.css").read_text()
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"Race: {report['recipe']} on {report['card']}"),
        tag("style", Html(style)),
    )
    parts = [
        tag("p", "Race", class_="eyebrow"),
        tag("h1", str(report["recipe"])),
        tag("p", f"on {report['card'].replace('-', ' ')}", class_="variant"),
        _verdict(report),
        _missing(report),
        _ratios(report),
        _rates(report),
        _contenders(report),
        _commands(report),
    ]
    body = tag("body", tag("main", join([part for part in parts if part])))
    return "<!doctype html>\n" + tag("html", head, body, lang="en") + "\n"


def _verdict(report: Mapping[str, Any]) -> Html:
    verdict = str(report["verdict"])
    findings = [tag("li", f"{one['kind']}: {one['message']}") for one in report["findings"]]
    return tag(
        "section",
        tag("strong", verdict),
        tag("p", f"{report['statement'][:1].upper()}{report['statement'][1:]}."),
        *([tag("ul", *findings)] if findings else []),
        class_=f"verdict {_TONES[verdict]}",
    )


def _missing(report: Mapping[str, Any]) -> Html:
    lines = []
    for pair in report["pairs"]:
        label = label_of(report, pair["peer"])
        if failure := pair["failure"]:
            lines.append(f"{label}: {failure['contender']} failed: {failure['message']}")
        elif pair["state"] != "complete":
            lines.append(f"{label}: {missing_text(pair, report)}")
    lines += [f"{name}: {why}" for name, why in report["not_raced"].items()]
    if not lines:
        return Html("")
    go_on = report["next_command"]
    more = [tag("p", "To go on: ", tag("code", go_on))] if go_on else []
    items = tag("ul", *(tag("li", line) for line in lines))
    return tag("section", tag("h2", "Not measured"), items, *more, class_="notrun")


def _ratios(report: Mapping[str, Any]) -> Html:
    names = [load["name"] for load in report["workloads"]]
    rows = []
    for pair in report["pairs"]:
        found = {row["workload"]: row["ratio"] for row in pair["workloads"]}
        cells = [with_small(*ratio_parts(found.get(name))) for name in names]
        rows.append([label_of(report, pair["peer"]), *cells])
    lead = (
        "Output tokens per second of ours over those of the peer. Both are loaded at the same time "
        "and take turns; the ratio is taken in each round. Median over the rounds, and its 95 % "
        "bootstrap interval."
    )
    parts = [table(["ours over", *names], rows)] if rows else []
    parts.append(_figure(report, "Ratio to each peer", ratio_figure))
    if beyond := [label_of(report, pair["peer"]) for pair in split_by_scale(report)[1]]:
        parts.append(tag("p", f"Too far away for this plot: {', '.join(beyond)}.", class_="small"))
    return section("Ratios", *parts, lead=lead)


def _rates(report: Mapping[str, Any]) -> Html:
    loads = report["workloads"]
    names = [load["name"] for load in loads]
    rates = {(row["contender"], row["workload"]): row for row in report["throughput"]}
    rows: list[list[object]] = []
    for name in report["contenders"]:
        cells = [rates.get((name, workload), {}) for workload in names]
        figures = [number(cell.get("output_tokens_per_s")) for cell in cells]
        rows.append([label_of(report, name), *figures])
    if report["ceilings"]:
        ceilings = [number(row["output_tokens_per_s"]) for row in report["ceilings"]]
        rows.append(["ceiling of the card for our artifact", *ceilings])
    lengths = {(load["isl"], load["osl"]) for load in loads}
    told = "; ".join(f"{isl} prompt and {osl} output tokens" for isl, osl in sorted(lengths))
    lead = f"Output tokens per second of the whole batch, median of all runs: {told} per request."
    energy = _energy(report, names, rates)
    return section(
        "Throughput",
        table(["", *names], rows),
        _figure(report, "Throughput over batch", throughput_figure),
        *energy,
        lead=lead,
    )


def _energy(
    report: Mapping[str, Any], names: list[str], rates: Mapping[tuple[str, str], Any]
) -> list[Html]:
    rows = [
        [
            label_of(report, name),
            *(number(rates.get((name, load), {}).get("joules_per_token")) for load in names),
        ]
        for name in report["contenders"]
    ]
    if not any(row.get("joules_per_token") for row in report["throughput"]):
        return []
    note = "Of the whole card, with the other contender loaded beside it and idle."
    return [tag("h3", "Joules per output token"), tag("p", note), table(["", *names], rows)]


def _figure(report: Mapping[str, Any], caption: str, figure: Any) -> Html:
    if not installed() or not report["throughput"]:
        return Html("")
    name = caption.lower().replace(" ", "-")
    drawn = inline_svg(figure(report), name)
    drawn = drawn.replace("<svg ", f'<svg role="img" aria-label="{caption}" ', 1)
    return tag("figure", tag("figcaption", caption), Html(drawn))


def _contenders(report: Mapping[str, Any]) -> Html:
    rows = []
    for name, contender in report["contenders"].items():
        told = tag("code", " ".join(contender["arguments"]))
        shown = "ours" if name == OURS else name
        rows.append(tag("dt", f"{shown}: {contender['label']}") + tag("dd", told))
    return section(
        "Contenders",
        tag("dl", *(tag("div", Html(row), class_="wide") for row in rows), class_="facts"),
    )


def _commands(report: Mapping[str, Any]) -> Html:
    parts = []
    for command in report["commands"]:
        shown = {
            name: command[name]
            for name in ("at", "samples", "loads_s", "tools", "before", "after")
            if command[name]
        }
        parts.append(tag("details", tag("summary", f"Command {command['command']}"), facts(shown)))
    return section("Conditions", *parts)
