"""Writes a report for programs: `report.json` and `junit.xml`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from pipeline.stages import Report, Verdict

REPORT_FILE = "report.json"
JUNIT_FILE = "junit.xml"


def write_report(report: Report, verdict: Verdict, folder: Path) -> dict[str, Path]:
    """Write both files into `folder`; returns them by name."""
    document = report.to_json(verdict)
    report_path, junit_path = folder / REPORT_FILE, folder / JUNIT_FILE
    report_path.write_text(json.dumps(document, indent=1) + "\n")
    junit_path.write_bytes(junit(document))
    return {REPORT_FILE: report_path, JUNIT_FILE: junit_path}


def junit(document: Mapping[str, Any]) -> bytes:
    """A report as JUnit XML: one case per workload, one for quality, what was not run as skipped.

    Findings become failures of the case whose name they start with, else of the quality case.
    """
    speed = {entry["workload"]: entry for entry in document["speed"]}
    cases = [f"speed.{name}" for name in speed]
    if document["quality"]:
        cases.append("quality")
    failures: dict[str, list[str]] = {case: [] for case in cases}
    for finding in document["findings"]:
        if finding["kind"] == "note":
            continue
        workload = finding["message"].split(":")[0]
        case = f"speed.{workload}" if workload in speed else "quality"
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
