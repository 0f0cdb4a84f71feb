"""Writes a report for programs, `report.json` and `junit.xml`, and for people, `report.html`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack
from xml.etree import ElementTree

from pipeline.acceptance.page import About, render_page
from pipeline.core.values import Report, Verdict

REPORT_FILE = "report.json"
JUNIT_FILE = "junit.xml"
PAGE_FILE = "report.html"


def write_report(
    report: Report, verdict: Verdict, folder: Path, **about: Unpack[About]
) -> dict[str, Path]:
    """Write the three files into `folder`; returns them by name.

    Args:
        report: What was measured.
        verdict: What the judge says of it.
        folder: Where they go.
        about: For the page only.
    """
    document = report.to_json(verdict)
    page = render_page(document, **about)
    files: dict[str, bytes] = {
        REPORT_FILE: (json.dumps(document, indent=1) + "\n").encode(),
        JUNIT_FILE: junit(document),
        PAGE_FILE: page.encode(),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return {name: folder / name for name in files}


def junit(document: Mapping[str, Any]) -> bytes:
    """A report as JUnit XML: one case per workload, one for quality, what was not run as skipped.

    Findings become failures of the case whose name they start with, else of the quality case.
    """
    speed = {entry["workload"]: entry for entry in document["speed"]}
    cases = [f"speed.{name}" for name in speed]
    cases += [part for part in ("quality", "chat", "lm_eval") if document.get(part)]
    failures: dict[str, list[str]] = {case: [] for case in cases}
    for finding in document["findings"]:
        if finding["kind"] == "note":
            continue
        workload = finding["message"].split(":")[0]
        case = f"speed.{workload}" if workload in speed else "quality"
        if workload in ("chat", "lm_eval"):
            case = workload
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
