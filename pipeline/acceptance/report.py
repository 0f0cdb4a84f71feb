"""Writes a report for programs, `report.json` and `junit.xml`, and for people, `report.html`.

The page is `report.html.j2` with `report.css`; here its tables are made of the report's values.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import statistics
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack
from xml.etree import ElementTree

from pipeline.acceptance import charts
from pipeline.acceptance.acceptance import Acceptance
from pipeline.acceptance.speed import MIN_ACHIEVED_SHARE
from pipeline.core.values import Report, Verdict

if TYPE_CHECKING:
    from jinja2 import Environment

REPORT_FILE = "report.json"
JUNIT_FILE = "junit.xml"
PAGE_FILE = "report.html"
DASH = "\u2013"
"""Stands for a figure that was not measured."""
Entry = Mapping[str, Any]
"""A part of the report; or a cell: `text`, `small` below it, and `tone`, its colour."""
RATE = "output_tokens_per_s"

# Not allowed in HTML, or in UTF-8 at all: controls but tab and newline, and lone surrogates.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_SPELLED = {
    "cpu": "CPU", "cpus": "CPUs", "cuda": "CUDA", "ecc": "ECC", "fp8": "FP8", "gemms": "GEMMs",
    "gpu": "GPU", "kv": "KV", "onnxruntime": "ONNX Runtime", "rtx": "RTX", "sm": "SM",
    "tensorrt": "TensorRT", "torch": "PyTorch", "transformers": "Transformers", "vllm": "vLLM",
}  # fmt: skip
_COSTS = (
    ("peak_memory_bytes", "peak memory, GiB", 2**30),
    ("mean_power_w", "power, W", 1),
    ("joules_per_token", "J per token", 1),
)
_LONGEST_ANSWER = 300
"""Characters of an answer that the page shows; `report.json` has all of it."""


class About(TypedDict, total=False):
    """What a page can have beside the report; `signed_by`: who signs it, and when, just after."""

    manifest: Entry
    reference: str
    registry: str  # where that is looked up
    plan: Entry  # `Plan.to_json`
    limits: Acceptance
    signed_by: str


def write_report(
    report: Report, verdict: Verdict, folder: Path, **about: Unpack[About]
) -> dict[str, Path]:
    """Write the three files into `folder`; returns them by name. `about` is for the page only."""
    document = report.to_json(verdict)
    written: dict[str, bytes] = {
        REPORT_FILE: (json.dumps(document, indent=1) + "\n").encode(),
        JUNIT_FILE: junit(document),
        PAGE_FILE: render_page(document, **about).encode(),
    }
    for name, content in written.items():
        (folder / name).write_bytes(content)
    return {name: folder / name for name in written}


def junit(document: Entry) -> bytes:
    """A report as JUnit XML: one case per workload, one for quality, what was not run as skipped.

    Findings become failures of the case whose name they start with, else of the quality case.
    """
    cases = {entry["workload"]: f"speed.{entry['workload']}" for entry in document["speed"]}
    cases |= {part: part for part in ("quality", "chat") if document.get(part)}
    failures: dict[str, list[str]] = {case: [] for case in cases.values()}
    for finding in document["findings"]:
        if finding["kind"] != "note":
            case = cases.get(finding["message"].split(":")[0], "quality")
            failures.setdefault(case, []).append(f"{finding['kind']}: {finding['message']}")
    suite = ElementTree.Element("testsuite", name=f"acceptance on {document['card']}")
    for case, messages in failures.items():
        element = ElementTree.SubElement(suite, "testcase", classname="acceptance", name=case)
        for message in messages:
            ElementTree.SubElement(element, "failure", message=message)
    for what in document["not_run"]:
        element = ElementTree.SubElement(suite, "testcase", classname="acceptance", name=what)
        ElementTree.SubElement(element, "skipped", message=what)
    suite.set("tests", str(len(suite)))
    suite.set("failures", str(sum(bool(messages) for messages in failures.values())))
    suite.set("skipped", str(len(document["not_run"])))
    xml: bytes = ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True)
    return xml


def render_page(report: Entry, **about: Unpack[About]) -> str:
    """A report, `Report.to_json`, as a complete page: no outside resource, no script."""
    from markupsafe import Markup

    manifest, speed, url = about.get("manifest", {}), report["speed"], about.get("registry", "")
    planned: Sequence[Entry] = about.get("plan", {}).get("workloads", ())
    # Whether it was measured on the card that the plan's ceilings are of.
    here = bool(report["conditions"].get("card") == report["card"])
    skipped = {f"not run: {what}" for what in report["not_run"]}
    findings = [found for found in report["findings"] if found["message"] not in skipped]
    folder = files(__package__)
    environment = _environment()
    return environment.from_string(folder.joinpath("report.html.j2").read_text()).render(
        report=report,
        style=Markup(folder.joinpath("report.css").read_text()),
        name=str(manifest.get("name") or "Package"),
        card=str(report["card"]).replace("-", " "),
        reference=about.get("reference", ""),
        lookup="" if url in {"", "artifacts"} else f" --registry {shlex.quote(url)}",
        signed_by=about.get("signed_by", ""),
        manifest=manifest,
        limits=about.get("limits"),
        on_card=here,
        tiles=list(_tiles(report)),
        findings=sorted(findings, key=lambda found: bool(found["kind"] == "note")),
        costs=[cost for cost in _COSTS if _known(speed, cost[0])],
        latencies={key: name for key, name in charts.LATENCIES.items() if _known(speed, key)},
        percentiles_known=any(charts.percentiles(speed, key) for key in charts.LATENCIES),
        planned=planned,
        measured={
            tuple(one[key] for key in ("workload", "batch", "isl", "osl")): one[RATE]
            for one in speed
            if here
        },
        plots={
            "speed": [] if here else charts.throughput_plots(speed, ()),
            "planned": charts.throughput_plots(speed if here else (), planned),
            "latency": charts.latency_plots(speed),
            "sustained": charts.sustained_plots(report.get("sustained")),
        },
    )


def _known(entries: Sequence[Entry], key: str) -> bool:
    return any(entry.get(key) is not None for entry in entries)


def _environment() -> Environment:
    """What the template may use; everything that it prints is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_printable,
    )
    words = (answer, interval, mark, mebibytes, number, percent, shown, signed, spoken)
    environment.globals |= {
        each.__name__: each for each in (*words, common_keys, cost_cells, rate, ratio, workload)
    }
    environment.globals |= {
        "dash": DASH,
        "min_achieved_share": MIN_ACHIEVED_SHARE,
        "spoken_pairs": lambda items: [(spoken(key), shown(value)) for key, value in items],
    }
    environment.filters |= {
        "shown": shown,
        "spoken": spoken,
        "in_entry": lambda key, entry: entry.get(key) is not None,
        "latency_of": lambda key, entry: latency(entry.get(key)),
    }
    return environment


def _tiles(report: Entry) -> Iterator[tuple[str, str]]:
    """The few figures that people ask for first; a rate only where the card gave it."""
    if change := report["quality"].get("perplexity_change"):
        low, high = f"{change['low']:+.2%}", f"{change['high']:+.2%}"
        yield f"{change['value']:+.2%}", f"perplexity against the source ({low} to {high})"
    if agreement := report["quality"].get("top1_agreement"):
        yield f"{agreement['value']:.1%}", "same most likely token as the source"
    if report["speed"] and (card := report["conditions"].get("card")):
        best = max(report["speed"], key=lambda entry: float(entry[RATE]))
        text = f"output tokens per second, {best['workload']}, on {card}"
        yield number(best[RATE]), text


def answer(one: Entry) -> Entry:
    """An answer of the chat probe."""
    text, ending = str(one["text"]), "ended" if one["stopped"] else "cut off at the bound"
    if len(text) > _LONGEST_ANSWER:
        text = f"{text[:_LONGEST_ANSWER]}\u2026"
    return {"text": text, "small": f"{one['tokens']} tokens, {ending}"}


def rate(entry: Entry) -> Entry:
    """Tokens per second, and how far the slowest and the fastest run lie from the median."""
    samples, small = entry.get("samples", ()), DASH
    middle = statistics.median(samples) if samples else 0
    if len(samples) == 1:
        small = "one run"
    elif middle > 0:
        low, high = min(samples) / middle - 1, max(samples) / middle - 1
        small = signed(f"{low:+.1%} to {high:+.1%}, {len(samples)} runs")
    return {"text": number(entry[RATE]), "small": small}


def ratio(found: Entry) -> Entry:
    """The engine's rate over a peer's, with its interval."""
    small = f"{found['rounds']} rounds, no interval"
    if found["low"] is not None:
        small = f"{number(found['low'])} to {number(found['high'])}"
    return {"text": number(found["median"]), "small": small}


def workload(name: str, load: Entry) -> Entry:
    """A workload with its sizes below the name."""
    count = f"batch {load['batch']}"
    if arriving := load.get("request_rate"):
        count = f"{arriving['asked']:g}\u00a0requests/s, {load['batch']} at once"
    lengths = f"{load['isl']}\u00a0+\u00a0{load['osl']}\u00a0tokens"
    isl, osl = (load.get(f"mean_{key}", load[key]) for key in ("isl", "osl"))
    if (isl, osl) != (load["isl"], load["osl"]):
        lengths += f" at most, {isl:.0f}\u00a0+\u00a0{osl:.0f} in the mean"
    return {"text": name, "small": f"{count} \u00b7 {lengths}"}


def cost_cells(entry: Entry, costs: Sequence[tuple[str, str, int]]) -> list[str]:
    """Memory and energy of a workload, in the units of `_COSTS`."""
    values = [(entry.get(key), scale) for key, _, scale in costs]
    return [DASH if value is None else number(value / scale) for value, scale in values]


def latency(value: object) -> Entry:
    """A latency of a workload: its median, and the percentiles that there are below it."""
    known = value if isinstance(value, Mapping) else {"p50": value}
    others = [f"{name}\u00a0{number(known[name])}" for name in known if name != "p50"]
    return {"text": number(known.get("p50")), "small": " \u00b7 ".join(others)}


def interval(entry: Entry | None, form: str) -> Entry:
    """A figure with its 95 % interval."""
    if entry is None:
        return {"text": DASH, "small": ""}
    value, low, high = (format(entry[part], form) for part in ("value", "low", "high"))
    return {"text": value, "small": f"{low} to {high}"}


def common_keys(value: Entry) -> list[str]:
    """The keys that all mappings of a mapping have; none if it holds anything else."""
    rows = list(value.values())
    alike = all(isinstance(row, Mapping) and row.keys() == rows[0].keys() for row in rows)
    return list(rows[0]) if alike else []


def _printable(value: Any) -> Any:
    """A value without characters that a page must not have; markup stays as it is."""
    return value if hasattr(value, "__html__") else _UNPRINTABLE.sub("\ufffd", str(value))


def mark(kept: bool | None) -> Entry:
    """Whether a limit is kept, in a word; colour only repeats it."""
    if kept is None:
        return {"text": DASH}
    return {"text": "met", "tone": "good"} if kept else {"text": "missed", "tone": "bad"}


def spoken(key: object) -> str:
    """A key of the report for people: `kv_cache_dtype` becomes `KV cache dtype`."""
    return " ".join(_SPELLED.get(word, word) for word in str(key).split("_"))


def shown(value: object) -> str:
    """Any plain value of the report for people."""
    if value is None or value == "":
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{spoken(key)} {shown(item)}" for key, item in value.items()) or "none"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "; ".join(shown(item) for item in value) or "none"
    return str(value)


def number(value: object, unit: str = "") -> str:
    """A measured figure with three to four digits; a dash if there is none."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return DASH
    size = abs(value)
    if not math.isfinite(value):
        return str(value)
    if 1000 <= size < 1e7:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.1f}" if 10 <= size < 1000 or size == 0 else f"{value:.3g}"
    return f"{text}\u00a0{unit}" if unit else text


def percent(value: float | None) -> str:
    """A share, or a dash."""
    return DASH if value is None else f"{value:.0%}"


def mebibytes(value: float | None) -> str:
    """Bytes as MiB, or a dash."""
    return DASH if value is None else signed(f"{value / 2**20:.1f} MiB")


def signed(text: str) -> str:
    """Text with a minus as printed."""
    return text.replace("-", "\u2212")
