"""Writes a report for programs, `report.json` and `junit.xml`, and for people, `report.html`.

The page is `report.html.j2` with `report.css`; here its tables are made of the report's values.
"""

from __future__ import annotations

import json
import math
import re
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
Row = Sequence[object]
"""Cells of a table: a value, or a mapping with `text`, `small` below it, and `tone`, its colour."""

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
    """What a page can have beside the report.

    Attributes:
        manifest: The package's manifest; without it the page has the digest only.
        reference: Of the package, such as `smollm2/any-checkpoint-fp8:1.0-…`.
        plan: `Plan.to_json`, for targets and ceilings.
        limits: What quality may lose, to be shown beside the figures.
        signed_by: Who signs it, and when; the page is written just before.
    """

    manifest: Entry
    reference: str
    plan: Entry
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
    cases |= {part: part for part in ("quality", "chat", "lm_eval") if document.get(part)}
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

    manifest, plan = about.get("manifest", {}), about.get("plan", {})
    limits, folder = about.get("limits"), files(__package__)
    # Whether it was measured on the card that the plan's ceilings are of.
    here = bool(report["conditions"].get("card") == report["card"])
    skipped = {f"not run: {what}" for what in report["not_run"]}
    findings = [found for found in report["findings"] if found["message"] not in skipped]
    planned: Sequence[Entry] = plan.get("workloads", ())
    return (
        _environment()
        .from_string(folder.joinpath("report.html.j2").read_text())
        .render(
            report=report,
            style=Markup(folder.joinpath("report.css").read_text()),
            name=str(manifest.get("name") or "Package"),
            card=str(report["card"]).replace("-", " "),
            reference=about.get("reference", ""),
            signed_by=about.get("signed_by", ""),
            note=manifest.get("source", {}).get("note"),
            limits=limits,
            on_card=here,
            tiles=list(_tiles(report)),
            findings=sorted(findings, key=lambda found: bool(found["kind"] == "note")),
            rows={
                "answers": _answers(report),
                "endings": _endings(report),
                "package": _package(report, manifest),
                **_speed(report),
                "planned": _planned(report["speed"] if here else (), planned),
                "latency": _latency(report),
                "quality": _quality(report, limits),
                "checkpoint": _checkpoint(report["quality"]),
                "lm_eval": _lm_eval(report),
            },
            percentiles_known=any(
                charts.percentiles(report["speed"], key) for key in charts.LATENCIES
            ),
            plots={
                "speed": [] if here else charts.throughput_plots(report["speed"], ()),
                "planned": charts.throughput_plots(report["speed"] if here else (), planned),
                "latency": charts.latency_plots(report["speed"]),
                "sustained": charts.sustained_plots(report.get("sustained")),
            },
        )
    )


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
    environment.globals |= {
        "dash": DASH,
        "mark": mark,
        "mebibytes": mebibytes,
        "number": number,
        "shown": shown,
        "signed": signed,
        "spoken": spoken,
        "tabulated": tabulated,
        "min_achieved_share": MIN_ACHIEVED_SHARE,
        "plots_installed": charts.installed(),
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
        best = max(report["speed"], key=lambda entry: float(entry["output_tokens_per_s"]))
        text = f"output tokens per second, {best['workload']}, on {card}"
        yield number(best["output_tokens_per_s"]), text


def _answers(report: Entry) -> list[Row]:
    """The chat probe's prompts, with the engine's answer and the source's."""

    def cell(one: Entry) -> Entry:
        text, ending = str(one["text"]), "ended" if one["stopped"] else "cut off at the bound"
        if len(text) > _LONGEST_ANSWER:
            text = f"{text[:_LONGEST_ANSWER]}\u2026"
        return {"text": text, "small": f"{one['tokens']} tokens, {ending}"}

    answers = report.get("chat", {}).get("answers", ())
    return [(one["name"], cell(one["engine"]), cell(one["source"])) for one in answers]


def _endings(report: Entry) -> list[Row]:
    """How many answers ended, and had text, on both sides."""
    chat = report.get("chat", {})
    return [
        (name, pairs["source"], pairs["engine"], f"{pairs['lost']} lost, {pairs['gained']} gained",
         f"{pairs['p_value']:.3g}", mark(pairs["p_value"] >= chat["level"]))
        for name, key in (("ended by themselves", "stopped"), ("had any text", "not_empty"))
        if (pairs := chat.get(key))
    ]  # fmt: skip


def _package(report: Entry, manifest: Entry) -> list[Row]:
    """What was measured."""
    rows: list[Row] = [("card", report["card"])]
    if not manifest:
        return rows
    runtime = manifest.get("match", {}).get("runtime", {})
    size_bytes = sum(file["size"] for file in manifest.get("files", ()))
    return [
        *rows,
        ("format", shown(manifest.get("format"))),
        ("runtime", f"{runtime.get('name', '')} {runtime.get('version', '')}".strip()),
        ("weights from", shown(manifest.get("source", {}).get("origin"))),
        ("licence of the weights", shown(manifest.get("licence", {}).get("spdx"))),
        ("size", number(size_bytes / 2**20, "MiB")),
        *((spoken(key), shown(value)) for key, value in manifest.get("limits", {}).items()),
    ]


def _speed(report: Entry) -> dict[str, Any]:
    """Median and spread of every workload, its peers, request rates, memory and energy."""
    entries: Sequence[Entry] = report["speed"]
    costs = [cost for cost in _COSTS if any(entry.get(cost[0]) is not None for entry in entries)]
    return {
        "speed": [
            (_workload(one["workload"], one), _rate(one), *_required(one)) for one in entries
        ],
        "peers": [
            (peer["label"], one["workload"], _rate(peer), _ratio(peer["ratio"]))
            for one in entries
            for peer in one.get("peers", {}).values()
        ],
        "rates": [
            (_workload(one["workload"], one), number(rate["asked"]), number(rate["achieved"]),
             mark(rate["achieved"] >= MIN_ACHIEVED_SHARE * rate["asked"]))
            for one in entries
            if (rate := one.get("request_rate"))
        ],
        "costs": costs and (
            ("workload", *(name for _, name, _ in costs)),
            [(one["workload"], *(number(_scaled(one.get(key), by)) for key, _, by in costs))
             for one in entries],
        ),
    }  # fmt: skip


def _rate(entry: Entry) -> Entry:
    """Tokens per second, and how far the slowest and the fastest run lie from the median."""
    samples, small = entry.get("samples", ()), DASH
    middle = statistics.median(samples) if samples else 0
    if len(samples) == 1:
        small = "one run"
    elif middle > 0:
        low, high = min(samples) / middle - 1, max(samples) / middle - 1
        small = signed(f"{low:+.1%} to {high:+.1%}, {len(samples)} runs")
    return {"text": number(entry["output_tokens_per_s"]), "small": small}


def _ratio(ratio: Entry) -> Entry:
    """The engine's rate over a peer's, with its interval."""
    small = f"{ratio['rounds']} rounds, no interval"
    if ratio["low"] is not None:
        small = f"{number(ratio['low'])} to {number(ratio['high'])}"
    return {"text": number(ratio["median"]), "small": small}


def _required(entry: Entry) -> Row:
    """What the recipe demands of a workload here, and whether it is met."""
    least = entry.get("min_output_tokens_per_s")
    if least is None:
        return DASH, mark(None)
    return number(least, "tok/s"), mark(bool(entry["output_tokens_per_s"] >= least))


def _workload(name: str, load: Entry) -> Entry:
    """A workload with its sizes below the name."""
    count = f"batch {load['batch']}"
    if rate := load.get("request_rate"):
        count = f"{rate['asked']:g}\u00a0requests/s, {load['batch']} at once"
    lengths = f"{load['isl']}\u00a0+\u00a0{load['osl']}\u00a0tokens"
    isl, osl = (load.get(f"mean_{key}", load[key]) for key in ("isl", "osl"))
    if (isl, osl) != (load["isl"], load["osl"]):
        lengths += f" at most, {isl:.0f}\u00a0+\u00a0{osl:.0f} in the mean"
    return {"text": name, "small": f"{count} \u00b7 {lengths}"}


def _planned(entries: Sequence[Entry], planned: Sequence[Entry]) -> list[Row]:
    """What the recipe wants of the card, what the card allows, and what was reached."""

    def sizes(load: Entry, name: str) -> Row:
        return load[name], load["batch"], load["isl"], load["osl"]

    measured = {sizes(entry, "workload"): entry["output_tokens_per_s"] for entry in entries}
    rows: list[Row] = []
    for load in planned:
        rate, target = measured.get(sizes(load, "name")), load["target"]
        kept = None if rate is None or target is None else bool(rate >= target)
        rows.append((
            _workload(load["name"], load), number(target),
            "not run" if rate is None else number(rate), mark(kept),
            {"text": number(load["ceiling"]), "small": f"bound by {load['bound']}"},
            percent(load["share"]), percent(None if rate is None else rate / load["ceiling"]),
        ))  # fmt: skip
    return rows


def _latency(report: Entry) -> tuple[Row, list[Row]] | None:
    """Headings and rows: percentiles where there are any, else medians."""

    def cell(value: object) -> Entry:
        known = value if isinstance(value, Mapping) else {"p50": value}
        others = [f"{name}\u00a0{number(known[name])}" for name in known if name != "p50"]
        return {"text": number(known.get("p50")), "small": " \u00b7 ".join(others)}

    entries = report["speed"]
    keys = [key for key in charts.LATENCIES if any(one.get(key) is not None for one in entries)]
    rows: list[Row] = [
        (entry["workload"], *(cell(entry.get(key)) for key in keys))
        for entry in entries
        if any(entry.get(key) is not None for key in keys)
    ]
    return (("workload", *(charts.LATENCIES[key] for key in keys)), rows) if rows else None


def _quality(report: Entry, limits: Acceptance | None) -> list[Row]:
    """Figures on held-out text with intervals and limits."""
    figures = report["quality"]
    if "perplexity_change" not in figures:
        return []
    kept_to: dict[str, tuple[str, bool]] = {}
    if limits:
        most, kl_most = limits.max_perplexity_increase, limits.max_mean_kl_nats
        least = limits.min_top1_agreement
        change, kl, top1 = (figures[key]["value"] for key, _ in _AGREEMENT)
        kept_to = {
            "perplexity_change": (f"at most {most:+.2%}", change <= most),
            "mean_kl_nats": (f"at most {kl_most:g}", kl <= kl_most),
            "top1_agreement": (f"at least {least:.2%}", top1 >= least),
        }
    rows: list[Row] = []
    for key, name, form in (
        ("source_perplexity", "perplexity of the source", ".5g"),
        ("engine_perplexity", "perplexity of the engine", ".5g"),
        ("perplexity_change", "change of perplexity", "+.2%"),
        ("mean_kl_nats", "mean KL(source \u2016 engine), nats", ".4g"),
        ("top1_agreement", "same most likely token", ".2%"),
    ):
        entry = figures.get(key, {})
        value, low, high = (
            format(entry[part], form) if part in entry else DASH
            for part in ("value", "low", "high")
        )
        limit, kept = kept_to.get(key, (DASH, None))
        rows.append((name, value, f"{low} to {high}", limit, mark(kept)))
    return rows


_AGREEMENT = (("perplexity_change", "+.2%"), ("mean_kl_nats", ".4g"), ("top1_agreement", ".2%"))


def _checkpoint(figures: Entry) -> list[Row]:
    """Source, checkpoint and engine: what quantization costs, and what the runtime adds."""
    found = figures.get("fp8_reference")
    if not found:
        return []

    def cell(entry: Entry | None, form: str) -> object:
        if entry is None:
            return DASH
        value, low, high = (format(entry[part], form) for part in ("value", "low", "high"))
        return {"text": value, "small": f"{low} to {high}"}

    return [
        (name, *(cell(entry.get(key), form) for key, form in _AGREEMENT))
        for name, entry in (
            ("checkpoint against the source", found),
            ("engine against the source", figures),
            ("engine against the checkpoint", found["engine"]),
            ("checkpoint against itself, summed otherwise", found["noise_floor"]),
        )
    ]


def _lm_eval(report: Entry) -> list[Row]:
    """Figures of the harness, task by task, beside the source's."""
    found = report.get("lm_eval") or {"engine": {"tasks": {}}}
    return [
        (task, name, number(found["source"]["tasks"][task]["metrics"][name]["value"]),
         number(metric["value"]))
        for task, result in found["engine"]["tasks"].items()
        for name, metric in result["metrics"].items()
    ]  # fmt: skip


def tabulated(value: Entry) -> tuple[Row, list[Row]] | None:
    """Headings and rows of a mapping of like mappings; None of any other."""
    rows = list(value.values())
    if not all(isinstance(row, Mapping) and row and row.keys() == rows[0].keys() for row in rows):
        return None
    cells: list[Row] = [(spoken(n), *(shown(v) for v in row.values())) for n, row in value.items()]
    return ("", *(spoken(column) for column in rows[0])), cells


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


def mebibytes(value: float | None, form: str = ".1f") -> str:
    """Bytes as MiB, or a dash."""
    return DASH if value is None else signed(f"{value / 2**20:{form}} MiB")


def signed(text: str) -> str:
    """Text with a minus as printed."""
    return text.replace("-", "\u2212")


def _scaled(value: object, scale: float) -> float | None:
    return value / scale if isinstance(value, (int, float)) else None
