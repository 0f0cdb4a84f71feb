"""The page's sections on verdict, package, quality, checks and conditions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.acceptance.judge import QualityLimits
from pipeline.acceptance.page.markup import (
    DASH,
    Html,
    facts,
    join,
    number,
    section,
    shown,
    spoken,
    table,
    tag,
    with_small,
)

NOTHING = Html("")

_VERDICTS = {
    "accepted": ("good", "It ran on the card that it is for and met every limit."),
    "checked": (
        "checked",
        "It ran here, but not on the card that it is for. What ran met every limit; speed and "
        "numerics on the card are not known.",
    ),
    "compiled": ("plain", "It was built, and nothing here could run it. Nothing was measured."),
    "rejected": ("bad", "It misses at least one target. It must not ship."),
    "regression": ("bad", "It answers worse than its source by more than allowed. Do not ship it."),
    "anomalous": (
        "bad",
        "A figure is better than it can be, so something was measured wrongly. No figure on this "
        "page can be relied on until the cause is found.",
    ),
    "inconclusive": (
        "warn",
        "The measurement is not good enough to judge by. That is no pass: measure again.",
    ),
}
_KINDS = {
    "rejected": "bad",
    "regression": "bad",
    "anomalous": "bad",
    "inconclusive": "warn",
    "note": "plain",
}
_CHECKS = {
    "fp8_plan": (
        "FP8 kernels in the compiled plan",
        "Read from the engine's own layer list: the linears that should run in FP8 do.",
    ),
    "network": (
        "The network that the compiler was given",
        "Computed from the parsed network and compared with the same graph in ONNX Runtime.",
    ),
    "two_layer_cut": (
        "A cut of a few layers",
        "The graph in ONNX Runtime against a simulation of the checkpoint, at the same tokens.",
    ),
}


def title(report: Mapping[str, Any], manifest: Mapping[str, Any]) -> Html:
    """Whose report it is."""
    version = f"{manifest.get('recipe_version')}, sha256:{report['digest'][:12]}"
    where = f"{manifest['variant']}, version {version}" if "variant" in manifest else ""
    return tag(
        "header",
        tag("p", "Acceptance report for ", report["card"], class_="eyebrow"),
        tag("h1", manifest.get("name") or "Package"),
        tag("p", tag("code", where or report["digest"]), class_="variant"),
    )


def verdict(report: Mapping[str, Any]) -> Html:
    """The judge's word and what it means."""
    name = report["verdict"]
    tone, meaning = _VERDICTS.get(name, ("plain", "This page does not know this verdict."))
    return tag(
        "section", tag("strong", name), tag("p", meaning), class_=f"verdict {tone}", role="status"
    )


def not_run(report: Mapping[str, Any]) -> Html:
    """What nobody should believe to have been tried."""
    if not report["not_run"]:
        return NOTHING
    items = [tag("li", what) for what in report["not_run"]]
    return tag("section", tag("h2", "Not run"), tag("ul", *items), class_="notrun")


def findings(report: Mapping[str, Any]) -> Html:
    """Why the verdict is what it is, failing findings first."""
    skipped = {f"not run: {what}" for what in report["not_run"]}
    told = [finding for finding in report["findings"] if finding["message"] not in skipped]
    if not told:
        return NOTHING
    told.sort(key=lambda finding: bool(finding["kind"] == "note"))
    items = [
        tag(
            "li",
            tag("span", finding["kind"], class_=f"chip {_KINDS.get(finding['kind'], 'plain')}"),
            finding["message"],
        )
        for finding in told
    ]
    return section("Findings", tag("ul", *items))


def tiles(report: Mapping[str, Any]) -> Html:
    """The few figures that people ask for first."""
    shown_first = []
    quality = report["quality"]
    if change := quality.get("perplexity_change"):
        low, high = f"{change['low']:+.2%}", f"{change['high']:+.2%}"
        text = f"perplexity against the source ({low} to {high})"
        shown_first.append((f"{change['value']:+.2%}", text))
    if agreement := quality.get("top1_agreement"):
        shown_first.append((f"{agreement['value']:.1%}", "same most likely token as the source"))
    if report["speed"]:
        best = max(report["speed"], key=lambda entry: float(entry["output_tokens_per_s"]))
        where = report["conditions"]["device"]
        where = "on a CPU, not on the card" if where == "cpu" else f"on {where}"
        text = f"output tokens per second, {best['workload']}, {where}"
        shown_first.append((number(best["output_tokens_per_s"]), text))
        ratios = [e for e in report["speed"] if e.get("ratio_to_transformers")]
        if ratios:
            least = min(ratios, key=lambda entry: float(entry["ratio_to_transformers"]))
            text = f"the speed of Transformers on the same machine, {least['workload']}"
            shown_first.append((f"{least['ratio_to_transformers']:.2f}\u00a0\u00d7", text))
    boxes = [tag("div", tag("b", n), tag("span", text), class_="tile") for n, text in shown_first]
    return tag("div", *boxes, class_="tiles") if boxes else NOTHING


def package(report: Mapping[str, Any], manifest: Mapping[str, Any]) -> Html:
    """What was judged."""
    rows: list[tuple[str, object]] = [("card", report["card"])]
    if manifest:
        match, source = manifest.get("match", {}), manifest.get("source", {})
        runtime = match.get("runtime", {})
        rows += [
            ("format", manifest.get("format")),
            ("runtime", f"{runtime.get('name', '')} {runtime.get('version', '')}".strip()),
            ("weights from", source.get("origin")),
            ("licence of the weights", manifest.get("licence", {}).get("spdx")),
            ("size", number(sum(f["size"] for f in manifest.get("files", ())) / 2**20, "MiB")),
        ]
        rows += [(spoken(key), value) for key, value in manifest.get("limits", {}).items()]
    pairs = [tag("div", tag("dt", key), tag("dd", shown(value))) for key, value in rows]
    digest = tag("dd", tag("code", f"sha256:{report['digest']}"))
    pairs.append(tag("div", tag("dt", "digest of the manifest"), digest, class_="wide"))
    if note := manifest.get("source", {}).get("note"):
        pairs.append(tag("div", tag("dt", "about the weights"), tag("dd", note), class_="wide"))
    return section("Package", tag("dl", *pairs, class_="facts"))


def quality(report: Mapping[str, Any], limits: QualityLimits | None) -> Html:
    """Figures on held-out text with intervals and limits."""
    figures = report["quality"]
    if "perplexity_change" not in figures:
        return NOTHING
    # Key, name, format, limit, and whether the figure keeps to it.
    rows: list[tuple[str, str, str, str, bool | None]] = [
        ("source_perplexity", "perplexity of the source", ".5g", "", None),
        ("engine_perplexity", "perplexity of the engine", ".5g", "", None),
    ]
    change, kl, top1 = (
        float(figures[key]["value"])
        for key in ("perplexity_change", "mean_kl_nats", "top1_agreement")
    )
    most, kl_most, least = (
        (limits.max_perplexity_increase, limits.max_mean_kl_nats, limits.min_top1_agreement)
        if limits
        else (None, None, None)
    )
    rows += [
        ("perplexity_change", "change of perplexity", "+.2%",
         "" if most is None else f"at most {most:+.2%}", None if most is None else change <= most),
        ("mean_kl_nats", "mean KL(source \u2016 engine), nats", ".4g",
         "" if kl_most is None else f"at most {kl_most:g}",
         None if kl_most is None else kl <= kl_most),
        ("top1_agreement", "same most likely token", ".2%",
         "" if least is None else f"at least {least:.2%}",
         None if least is None else top1 >= least),
    ]  # fmt: skip
    cells = []
    for key, name, form, limit, kept in rows:
        entry = figures.get(key, {})
        value, low, high = (
            format(entry[part], form) if part in entry else DASH
            for part in ("value", "low", "high")
        )
        cells.append((name, value, f"{low} to {high}", limit or DASH, mark(kept)))
    headings = ("figure", "measured", "95 % interval", "limit", "result")
    lead = (
        f"{shown(figures.get('tokens'))} tokens of held-out text in {figures.get('windows')} "
        "windows; the calibration has not seen them."
    )
    reference = _reference(figures, limits)
    return section("Quality", table(headings, cells), reference, lead=lead)


def _reference(figures: Mapping[str, Any], limits: QualityLimits | None) -> Html:
    """Source, checkpoint and engine: what FP8 costs, and what the runtime adds."""
    found = figures.get("fp8_reference")
    if not found:
        return NOTHING
    forms = (("perplexity_change", "+.2%"), ("mean_kl_nats", ".4g"), ("top1_agreement", ".2%"))
    pairs = (
        ("FP8 checkpoint against the source", found),
        ("engine against the source", figures),
        ("engine against the checkpoint", found["engine"]),
        ("checkpoint against itself, summed otherwise", found["noise_floor"]),
    )
    rows = [
        (name, *(
            with_small(
                format(entry[key]["value"], form),
                f"{entry[key]['low']:{form}} to {entry[key]['high']:{form}}",
            ) if key in entry else DASH
            for key, form in forms
        ))
        for name, entry in pairs
    ]  # fmt: skip
    told = (
        "The checkpoint is simulated in float32. Two right runtimes of one FP8 checkpoint differ "
        "as much as it differs from itself when its sums are rounded otherwise"
    )
    if not found["judged"]:
        told += ". A card computes in 16 bit, which that does not have, so this is not judged here."
    else:
        told += f"; {limits.max_reference_noise:g} times that is allowed." if limits else "."
    headings = ("", "perplexity", "mean KL, nats", "same most likely token")
    title = tag("h3", "The checkpoint itself")
    return Html(title + tag("p", told, class_="small") + table(headings, rows))


def mark(kept: bool | None) -> Html:
    """Whether a limit is kept, in a word; colour only repeats it."""
    if kept is None:
        return Html(DASH)
    return tag("span", "met" if kept else "missed", class_=f"mark {'good' if kept else 'bad'}")


def checks(report: Mapping[str, Any]) -> Html:
    """What is known about the engine although it did not run."""
    parts = []
    for key, value in report["checks"].items():
        name, meaning = _CHECKS.get(key, (spoken(key), ""))
        parts.append(tag("h3", name))
        if meaning:
            parts.append(tag("p", meaning, class_="small"))
        if not isinstance(value, Mapping):
            parts.append(tag("p", shown(value)))
            continue
        brief = {k: v for k, v in value.items() if k != "layer_kinds"}
        parts.append(facts(brief))
        if kinds := value.get("layer_kinds"):
            inner = facts({"layers": kinds} if not isinstance(kinds, Mapping) else kinds)
            parts.append(tag("details", tag("summary", "Layers by kind"), inner))
    return section("Checked without running the engine", join(parts)) if parts else NOTHING


def conditions(report: Mapping[str, Any]) -> Html:
    """Where and with what it was measured."""
    return section("Conditions", facts(report["conditions"]))


def footer(report: Mapping[str, Any], *, plots: bool) -> Html:
    """Where the numbers are for programs, and why there may be no plots."""
    text = f"Schema {report['schema']}. The same figures for programs: report.json, junit.xml."
    if not plots:
        text += (
            " No plots: matplotlib was not installed where this page was written; it comes with "
            "the extra `build`."
        )
    return tag("footer", text)
