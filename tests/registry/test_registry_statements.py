from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import (
    ConflictError,
    CorruptError,
    NotFoundError,
    RecipeError,
    UntrustedError,
)
from pipeline.core.values import Reference

Bench = Any


def _tree(root: Path) -> dict[str, bytes]:
    """Every visible file, and what is left in the private ones."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and ".locks" not in path.parts
    }


def test_statement_lies_beside_the_package_and_is_only_ever_added(bench: Bench) -> None:
    reference = bench.publish()
    package = bench.registry.location(reference)
    before = _tree(package)
    path = bench.accept(reference)
    assert path == package.with_name(f"{reference.version}.statements") / "test-1"
    assert json.loads((path / "report.json").read_text())["digest"] == reference.digest
    assert not (path / "report.json").stat().st_mode & 0o222
    assert bench.accept(reference) == path
    with pytest.raises(ConflictError, match="only ever added"):
        bench.accept(reference, verdict="accepted")
    assert json.loads((path / "report.json").read_text())["verdict"] == "checked"
    assert _tree(package) == before


def test_statement_may_be_given_as_files(bench: Bench, tmp_path: Path) -> None:
    reference = bench.publish()
    (tmp_path / "junit.xml").write_text("<testsuite/>")
    files = {"junit.xml": tmp_path / "junit.xml"}
    path = bench.registry.add_statement(reference, "junit", files)
    assert (path / "junit.xml").read_text() == "<testsuite/>"
    assert bench.registry.add_statement(reference, "junit", files) == path
    with pytest.raises(ConflictError):
        bench.registry.add_statement(reference, "junit", {**files, "more.txt": b""})


def test_statement_about_another_package_is_refused(bench: Bench) -> None:
    one = bench.publish()
    other = bench.publish(label=bench.label("2.0"))
    with pytest.raises(CorruptError, match="speaks of another package"):
        bench.registry.add_statement(one, "test", {"report.json": bench.report(other)})
    gone = Reference(name="tiny", variant="v", version="3.0", digest=one.digest)
    with pytest.raises(NotFoundError, match="publish it first"):
        bench.registry.add_statement(gone, "test", {"report.json": bench.report(gone)})
    forged = Reference(name=one.name, variant=one.variant, version=one.version, digest="0" * 64)
    with pytest.raises(ConflictError):
        bench.registry.add_statement(forged, "test", {"report.json": bench.report(forged)})
    assert not list(bench.registry.path.glob("*/*/*.statements"))


@pytest.mark.parametrize("name", ["", "..", "a/b", "../x", ".hidden"])
def test_statement_and_its_files_cannot_leave_their_folder(bench: Bench, name: str) -> None:
    reference = bench.publish()
    before = _tree(bench.registry.path.parent)
    with pytest.raises(RecipeError):
        bench.registry.add_statement(reference, name, {"x.txt": b""})
    with pytest.raises(RecipeError):
        bench.registry.add_statement(reference, "test", {name: b""})
    assert _tree(bench.registry.path.parent) == before


def test_statement_about_replaced_bytes_counts_for_nothing(bench: Bench) -> None:
    """Someone removed a package but not its statements, then built that version again."""
    reference = bench.publish()
    bench.accept(reference)
    shutil.rmtree(bench.registry.location(reference))
    again = bench.publish(bench.engine(plan=b"other"))
    (entry,) = bench.registry.entries()
    assert entry.verdict is None
    bench.sign(again)
    with pytest.raises(UntrustedError, match="verdict is not signed"):
        bench.enter(again)


@pytest.mark.parametrize(
    "report",
    [b"", b"[]", b"{}", b"\xff", b'{"schema":1,"verdict":"fine"}', b'{"digest":' * 50_000],
)
def test_unreadable_report_is_shown_as_such(bench: Bench, report: bytes) -> None:
    reference = bench.publish()
    folder = bench.accept(reference)
    (folder / "report.json").chmod(0o644)
    (folder / "report.json").write_bytes(report)
    (entry,) = bench.registry.entries()
    assert entry.verdict is None
    assert "report.json cannot be used" in entry.statements[0].fault
