"""A report of acceptance as a page: the verdict and what to do first, then what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

from pipeline.acceptance.acceptance import Acceptance
from pipeline.acceptance.page import measured
from pipeline.acceptance.page.charts import installed
from pipeline.acceptance.page.document import (
    Banner,
    Block,
    Bullets,
    Cell,
    Details,
    Document,
    Facts,
    Heading,
    Section,
    Table,
    Tone,
    facts_of,
    render,
)
from pipeline.acceptance.page.words import DASH, number, shown, spoken

Entry = Mapping[str, Any]

_VERDICTS: dict[str, tuple[Tone, str, str]] = {
    "accepted": (
        "good",
        "Ship it to {card}: it ran there and met every limit.",
        "`enginesmith promote {reference} --channel stable`",
    ),
    "checked": (
        "checked",
        "Not proven on {card}: it ran on other hardware, where its answers met every limit. Speed "
        "and numerics on the card are not known.",
        "run `enginesmith accept {reference}` on a machine with {card}",
    ),
    "compiled": (
        "plain",
        "Not proven on {card}: it was built, and nothing here could run it. Nothing was measured.",
        "run `enginesmith accept {reference}` on a machine with {card}",
    ),
    "rejected": (
        "bad",
        "Do not ship it: it misses at least one target on {card}.",
        "see the findings, change sizes or the target, and build again",
    ),
    "regression": (
        "bad",
        "Do not ship it: it answers worse than its source by more than allowed.",
        "see the findings; keep more linears in 16 bit (`quantizer.keep_16bit`)",
    ),
    "anomalous": (
        "bad",
        "Do not ship it: a figure is better than it can be, so something was measured wrongly. No "
        "figure on this page can be relied on until the cause is found.",
        "see the findings, and measure again once the cause is known",
    ),
    "inconclusive": (
        "warn",
        "Do not ship it yet: the measurement is not good enough. That is no pass.",
        "see the findings, and measure again",
    ),
    "measured": (
        "plain",
        "A race: its speed was measured beside its peers. Its answers were not looked at.",
        "build it, which looks at its answers",
    ),
}
"""Verdict -> colour, what it means, and what to do next."""
_CHECKS = {
    "plan": (
        "Quantized kernels in the compiled plan",
        "Read from the engine's own layer list: the linears that should run quantized do.",
    ),
    "network": (
        "The network that the compiler was given",
        "Computed from the parsed network and compared with the same graph in ONNX Runtime.",
    ),
    "two_layer_cut": (
        "A few layers of the graph",
        "The graph in ONNX Runtime against a simulation of the checkpoint, at the same tokens.",
    ),
}
_QUALITY = (
    ("source_perplexity", "perplexity of the source", ".5g"),
    ("engine_perplexity", "perplexity of the engine", ".5g"),
    ("perplexity_change", "change of perplexity", "+.2%"),
    ("mean_kl_nats", "mean KL(source \u2016 engine), nats", ".4g"),
    ("top1_agreement", "same most likely token", ".2%"),
)
"""Key, name and format of each figure."""
_LONGEST_ANSWER = 300
"""Characters of an answer that the page shows; `report.json` has all of it."""


@dataclass(frozen=True, kw_only=True)
class Signing:
    """By whom and when the report is signed: the page is written just before.

    Attributes:
        signer: The key, for people.
        signed_at: RFC 3339, UTC.
    """

    signer: str
    signed_at: str


class About(TypedDict, total=False):
    """What a page can have beside the report.

    Attributes:
        manifest: The package's manifest; without it the page has the digest only.
        reference: Of the package, such as `smollm2/any-checkpoint-fp8:1.0-…`.
        plan: `Plan.to_json`, for targets and ceilings.
        limits: What quality may lose, to be shown beside the figures.
        signing: Who signs it.
    """

    manifest: Entry
    reference: str
    plan: Entry
    limits: Acceptance
    signing: Signing | None


def render_page(report: Entry, **about: Unpack[About]) -> str:
    """A report, `Report.to_json`, as an HTML page.

    Parts that a report lacks are left out of the page; measured rates are held against the plan
    only if `conditions.card` is the report's card. Plots need matplotlib; without it the page says
    so and has its tables.
    """
    reference, limits = about.get("reference", ""), about.get("limits")
    manifest, plan = about.get("manifest", {}), about.get("plan", {})
    name = str(manifest.get("name") or "Package")
    card = str(report["card"]).replace("-", " ")
    footer = f"Schema {report['schema']}. The same figures for programs: report.json, junit.xml."
    if not installed():
        footer += (
            " No plots: matplotlib was not installed where this page was written; it comes with "
            "the extra `build`."
        )
    sections = [
        _not_run(report),
        _findings(report),
        _chat(report),
        _package(report, manifest),
        measured.speed(report),
        measured.targets(report, plan),
        measured.latency(report),
        measured.sustained(report),
        _quality(report, limits),
        _lm_eval(report),
        _checks(report),
        Section(title="Conditions", blocks=facts_of(report["conditions"])),
    ]
    document = Document(
        title=f"{report['verdict']}: {name} for {report['card']}",
        eyebrow=f"Acceptance report for {card}",
        name=name,
        subject=reference or f"sha256:{report['digest']}",
        banner=_banner(report["verdict"], card, reference or "REFERENCE", about.get("signing")),
        tiles=_tiles(report),
        sections=[section for section in sections if section is not None],
        footer=footer,
    )
    return render(document)


def _banner(verdict: str, card: str, reference: str, signing: Signing | None) -> Banner:
    tone, meaning, next_step = _VERDICTS[verdict]
    lines = [("next", next_step.format(reference=reference, card=card))]
    if signing:
        lines.append(("signed by", f"{signing.signer}, {signing.signed_at}"))
    return Banner(word=verdict, tone=tone, meaning=meaning.format(card=card), lines=lines)


def _tiles(report: Entry) -> list[tuple[str, str]]:
    """The few figures that people ask for first; a rate only where the card gave it."""
    tiles = []
    quality = report["quality"]
    if change := quality.get("perplexity_change"):
        low, high = f"{change['low']:+.2%}", f"{change['high']:+.2%}"
        text = f"perplexity against the source ({low} to {high})"
        tiles.append((f"{change['value']:+.2%}", text))
    if agreement := quality.get("top1_agreement"):
        tiles.append((f"{agreement['value']:.1%}", "same most likely token as the source"))
    if report["speed"] and report["conditions"].get("card"):
        best = max(report["speed"], key=lambda entry: float(entry["output_tokens_per_s"]))
        text = f"output tokens per second, {best['workload']}, on {report['conditions']['card']}"
        tiles.append((number(best["output_tokens_per_s"]), text))
    return tiles


def _not_run(report: Entry) -> Section | None:
    """What must not be taken for tried."""
    if not report["not_run"]:
        return None
    items = [Cell(what) for what in report["not_run"]]
    return Section(title="Not run", blocks=[Bullets(items=items)], look="notrun")


def _findings(report: Entry) -> Section | None:
    """Why the verdict is what it is, failing findings first."""
    skipped = {f"not run: {what}" for what in report["not_run"]}
    found = [finding for finding in report["findings"] if finding["message"] not in skipped]
    if not found:
        return None
    found.sort(key=lambda finding: bool(finding["kind"] == "note"))
    items = [
        Cell(one["message"], small=one["kind"], tone=_VERDICTS.get(one["kind"], ("plain",))[0])
        for one in found
    ]
    return Section(title="Findings", blocks=[Bullets(items=items)])


def _package(report: Entry, manifest: Entry) -> Section:
    """What was measured."""
    pairs: list[tuple[str, object]] = [("card", report["card"])]
    if manifest:
        match, source = manifest.get("match", {}), manifest.get("source", {})
        runtime = match.get("runtime", {})
        size_bytes = sum(file["size"] for file in manifest.get("files", ()))
        pairs += [
            ("format", shown(manifest.get("format"))),
            ("runtime", f"{runtime.get('name', '')} {runtime.get('version', '')}".strip()),
            ("weights from", shown(source.get("origin"))),
            ("licence of the weights", shown(manifest.get("licence", {}).get("spdx"))),
            ("size", number(size_bytes / 2**20, "MiB")),
        ]
        pairs += [(spoken(key), shown(value)) for key, value in manifest.get("limits", {}).items()]
    wide: list[tuple[str, object]] = [("digest of the manifest", f"sha256:{report['digest']}")]
    if note := manifest.get("source", {}).get("note"):
        wide.append(("about the weights", note))
    return Section(title="Package", blocks=[Facts(pairs=pairs, wide=wide)])


def _quality(report: Entry, limits: Acceptance | None) -> Section | None:
    """Figures on held-out text with intervals and limits."""
    figures = report["quality"]
    if "perplexity_change" not in figures:
        return None
    kept_to: dict[str, tuple[str, bool]] = {}
    if limits:
        change, kl, top1 = (
            float(figures[key]["value"])
            for key in ("perplexity_change", "mean_kl_nats", "top1_agreement")
        )
        most, kl_most = limits.max_perplexity_increase, limits.max_mean_kl_nats
        least = limits.min_top1_agreement
        kept_to = {
            "perplexity_change": (f"at most {most:+.2%}", change <= most),
            "mean_kl_nats": (f"at most {kl_most:g}", kl <= kl_most),
            "top1_agreement": (f"at least {least:.2%}", top1 >= least),
        }
    cells = []
    for key, name, form in _QUALITY:
        entry = figures.get(key, {})
        value, low, high = (
            format(entry[part], form) if part in entry else DASH
            for part in ("value", "low", "high")
        )
        limit, kept = kept_to.get(key, (DASH, None))
        cells.append((name, value, f"{low} to {high}", limit, measured.mark(kept)))
    headings = ("figure", "measured", "95 % interval", "limit", "result")
    lead = (
        f"{shown(figures.get('tokens'))} tokens of held-out text in {figures.get('windows')} "
        "windows; the calibration has not seen them."
    )
    blocks: list[Block] = [Table(headings=headings, rows=cells), *_reference(figures, limits)]
    return Section(title="Quality", blocks=blocks, lead=lead)


def _reference(figures: Entry, limits: Acceptance | None) -> list[Block]:
    """Source, checkpoint and engine: what quantization costs, and what the runtime adds."""
    found = figures.get("fp8_reference")
    if not found:
        return []
    forms = (("perplexity_change", "+.2%"), ("mean_kl_nats", ".4g"), ("top1_agreement", ".2%"))
    pairs = (
        ("checkpoint against the source", found),
        ("engine against the source", figures),
        ("engine against the checkpoint", found["engine"]),
        ("checkpoint against itself, summed otherwise", found["noise_floor"]),
    )
    rows = [
        (name, *(
            Cell(
                format(entry[key]["value"], form),
                small=f"{entry[key]['low']:{form}} to {entry[key]['high']:{form}}",
            ) if key in entry else DASH
            for key, form in forms
        ))
        for name, entry in pairs
    ]  # fmt: skip
    small = (
        f"The checkpoint is simulated in float32, over {shown(found.get('windows'))} windows. Two "
        "right runtimes of one checkpoint differ as much as it differs from itself when its sums "
        "are rounded otherwise"
    )
    if not found["judged"]:
        small += ". A card computes in 16 bit, which that does not have: no limit applies here."
    else:
        small += f"; {limits.max_reference_noise:g} times that is allowed." if limits else "."
    headings = ("", "perplexity", "mean KL, nats", "same most likely token")
    return [Heading(text="The checkpoint itself", small=small), Table(headings=headings, rows=rows)]


def _chat(report: Entry) -> Section | None:
    """Answers beside the source's, and whether the engine ends them where the source does."""
    found = report.get("chat")
    if not found or "not_run" in found:
        return None
    answers = [
        (one["name"], _answer(one["engine"]), _answer(one["source"])) for one in found["answers"]
    ]
    table = ("prompt", "engine", "source")
    level = found["level"]
    rows = [
        (name, pairs["source"], pairs["engine"], f"{pairs['lost']} lost, {pairs['gained']} gained",
         f"{pairs['p_value']:.3g}", measured.mark(pairs["p_value"] >= level))
        for name, pairs in (
            ("ended by themselves", found["stopped"]), ("had any text", found["not_empty"]),
        )
    ]  # fmt: skip
    missing = found["eos"]["missing"]
    ignored = {True: "no", False: "yes", None: "not tried"}[found["stop_id_ignored"]]
    held: list[tuple[str, object, bool]] = [
        ("template gives the same tokens", len(found["template_differs"]) or "of all prompts",
         not found["template_differs"]),
        ("end-of-sequence ids of the source", missing or found["eos"]["engine"], not missing),
        ("answers without one inside", len(found["eos_inside"]) or "all", not found["eos_inside"]),
        ("ends at an id that it must end at", ignored, not found["stop_id_ignored"]),
    ]  # fmt: skip
    lead = (
        f"{len(answers)} short conversations through the chat template, greedily, at most "
        f"{found['max_new_tokens']} tokens each. A loss that chance alone would bring in fewer "
        f"than {level:.0%} of all probes is a regression."
    )
    blocks: list[Block] = [
        Table(headings=table, rows=answers[:2], words=3),
        Details(summary="All answers", blocks=[Table(headings=table, rows=answers, words=3)]),
        Table(headings=("answers that", "source", "engine", "pairs", "p", "result"), rows=rows),
        Table(
            headings=("what must hold", "found", "result"),
            rows=[(name, shown(value), measured.mark(kept)) for name, value, kept in held],
        ),
    ]
    return Section(title="Answers", blocks=blocks, lead=lead)


def _answer(one: Entry) -> Cell:
    text = str(one["text"])
    short = text if len(text) <= _LONGEST_ANSWER else f"{text[:_LONGEST_ANSWER]}\u2026"
    ending = "ended" if one["stopped"] else "cut off at the bound"
    return Cell(short, small=f"{one['tokens']} tokens, {ending}")


def _lm_eval(report: Entry) -> Section | None:
    """Figures of the harness, task by task, beside the source's."""
    found = report.get("lm_eval")
    if not found:
        return None
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
    headings = ("task", "metric", "source", "engine")
    return Section(title="lm-eval", blocks=[Table(headings=headings, rows=rows, words=2)])


def _checks(report: Entry) -> Section | None:
    """What is known about the engine although it did not run."""
    blocks: list[Block] = []
    for key, value in report["checks"].items():
        name, meaning = _CHECKS.get(key, (spoken(key), ""))
        blocks.append(Heading(text=name, small=meaning))
        if not isinstance(value, Mapping):
            blocks.append(Facts(pairs=[("found", shown(value))]))
            continue
        blocks += facts_of({k: v for k, v in value.items() if k != "layer_kinds"})
        if kinds := value.get("layer_kinds"):
            inner = facts_of(kinds if isinstance(kinds, Mapping) else {"layers": kinds})
            blocks.append(Details(summary="Layers by kind", blocks=inner))
    return Section(title="Checked without running the engine", blocks=blocks) if blocks else None
