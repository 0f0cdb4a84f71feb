"""Every test that the table of faults names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REFERENCE = re.compile(r"`((?:[\w/]+\.py|…)(?:::\*(\w+))?)`")


def references() -> list[tuple[str, str]]:
    """(file below tests/, end of the test's name or nothing) of each row, `…` resolved."""
    found: list[tuple[str, str]] = []
    for line in (ROOT / "docs/reliability.md").read_text().splitlines():
        if re.match(r"\| \d+ \|", line):
            path = ""
            for whole, name in REFERENCE.findall(line.rsplit("|", 2)[1]):
                path = path if whole.startswith("…") else whole.partition("::")[0]
                found.append((path, name))
    return found


def test_all_rows_are_read() -> None:
    rows = re.findall(r"^\| (\d+) \|", (ROOT / "docs/reliability.md").read_text(), re.MULTILINE)
    assert [int(row) for row in rows] == list(range(1, 25))
    assert len(references()) > 60


@pytest.mark.parametrize(("path", "name"), sorted(set(references())))
def test_what_shows_a_fault_exists(path: str, name: str) -> None:
    source = (ROOT / "tests" / path).read_text()
    if name:
        assert re.search(rf"^def test_\w*{name}\b", source, re.MULTILINE), f"{path} has no {name}"
