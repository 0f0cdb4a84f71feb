from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from pipeline.registry.render import _size, render_list, render_show
from pipeline.registry.signing.keys import generate_key
from pipeline.registry.signing.signer import build_statements, sign_report
from pipeline.registry.signing.summary import Signatures, signatures_of
from pipeline.registry.signing.trust import TrustPolicy
from tests.registry.signing.conftest import RUN, trusted

Bench = Any


def _shown(renderable: Any, width: int = 200) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(renderable)
    return stream.getvalue()


def test_list_has_a_line_for_each_version(bench: Bench) -> None:
    whole = bench.publish()
    bench.approve(whole)
    bench.enter(whole)
    damaged = bench.publish(label=bench.label("2.0"))
    (bench.registry.location(damaged) / "manifest.json").unlink()
    lines = _shown(render_list(bench.registry.entries(bench.policy))).splitlines()
    (line,) = [line for line in lines if str(whole) in line]
    assert "402 B" in line
    assert "checked" in line
    assert f"candidate ({bench.card})" in line
    (line,) = [line for line in lines if str(damaged) in line]
    assert "damaged" in line


def test_show_tells_what_it_is_where_it_fits_and_what_was_said(bench: Bench) -> None:
    reference = bench.publish()
    bench.accept(reference)
    shown = _shown(render_show(bench.registry.entry(str(reference)), Signatures(reason="unsigned")))
    for fact in (
        f"sha256:{reference.digest}",
        "sm_89; 1.00 GiB free, tensorrt-rtx 1.7.1.116",
        "unsigned",
        "hub:someone/tiny",
        "Apache-2.0",
        "engine/model.plan",
        "checked",
        "note: ran on a CPU",
    ):
        assert fact in shown


def test_show_tells_who_signed_and_whether_that_is_trusted_here(bench: Bench) -> None:
    key = generate_key()
    with bench.registry.staging() as staging:
        package = bench.seal(staging)
        reference = bench.registry.publish(package, build_statements(package, key, RUN))
    report = bench.report(reference)
    files = {"report.json": report, **sign_report(report, key)}
    bench.registry.add_statement(reference, "test-1", files)
    entry = bench.registry.entry(str(reference))
    folder = bench.registry.statements_dir(reference)

    policy = TrustPolicy(keys=(trusted(key, "builds", "verdicts", name="our ci"),))
    shown = _shown(render_show(entry, signatures_of(entry, folder, policy)))
    assert f"signed by our ci (key {key.public.keyid[:12]}), trusted here" in shown
    (line,) = [line for line in shown.splitlines() if line.startswith("test-1")]
    assert "our ci" in line

    found = signatures_of(entry, folder, TrustPolicy())
    assert (found.signer, found.verdicts) == (None, {})
    assert "not trusted: " in _shown(render_show(entry, found))
    assert "nobody trusted" in _shown(render_show(entry, found))


def test_show_of_a_damaged_package_names_the_damage(bench: Bench) -> None:
    reference = bench.publish()
    (bench.registry.location(reference) / "engine" / "model.plan").unlink()
    shown = _shown(render_show(bench.registry.entry(str(reference)), Signatures(reason="unsigned")))
    assert "'engine/model.plan' is missing" in shown


def test_markup_and_terminal_escapes_of_a_report_are_not_obeyed(bench: Bench) -> None:
    reference = bench.publish()
    report = bench.report(reference).replace(b"ran on a CPU", b"[red]x[/red]\\u001b[2J")
    bench.registry.add_statement(reference, "test", {"report.json": report})
    shown = _shown(render_show(bench.registry.entry(str(reference)), Signatures(reason="unsigned")))
    assert "[red]x[/red]" in shown
    assert "\x1b[2J" not in shown


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_600, "1 MB"), (165_400_000, "165 MB"),
     (4_096_000_000, "4.1 GB"), (3 * 10**15, "3e+03 TB")],
)  # fmt: skip
def test_sizes_have_three_digits(size_bytes: int, text: str) -> None:
    assert _size(size_bytes) == text
