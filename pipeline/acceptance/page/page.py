"""`render_page`: what was measured, and what was not, on one page without any outside resource."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from pipeline.acceptance.judge import QualityLimits
from pipeline.acceptance.page import answers, measured, sections
from pipeline.acceptance.page.charts import installed
from pipeline.acceptance.page.markup import Html, join, tag

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""Even if escaping had a hole, a browser would load nothing and run no script."""


def render_page(
    report: Mapping[str, Any],
    *,
    manifest: Mapping[str, Any] | None = None,
    plan: Mapping[str, Any] | None = None,
    limits: QualityLimits | None = None,
) -> str:
    """A report as an HTML page.

    Args:
        report: `Report.to_json`. Parts that a report lacks are left out of the page; measured rates
            are held against the plan only if `conditions.card` is the report's card.
        manifest: The package's manifest, for name, variant and limits; without it the page has the
            digest only.
        plan: `Plan.to_json`, for targets and ceilings.
        limits: What quality may lose, to be shown beside the figures.

    Returns:
        The page. Plots need matplotlib; without it the page says so and has its tables.
    """
    manifest, plan = manifest or {}, plan or {}
    name = manifest.get("name") or "Package"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{report['verdict']}: {name} for {report['card']}"),
        tag("style", Html(files(__package__).joinpath("page.css").read_text())),
    )
    parts = [
        sections.title(report, manifest),
        sections.verdict(report),
        sections.not_run(report),
        sections.findings(report),
        sections.tiles(report),
        sections.package(report, manifest),
        measured.speed(report),
        measured.targets(report, plan),
        measured.latency(report),
        measured.sustained(report),
        sections.quality(report, limits),
        answers.lm_eval(report),
        answers.chat(report),
        sections.checks(report),
        sections.conditions(report),
        sections.footer(report, plots=installed()),
    ]
    body = tag("body", tag("main", join([part for part in parts if part])))
    return "<!doctype html>\n" + tag("html", head, body, lang="en") + "\n"
