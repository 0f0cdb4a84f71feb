from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import (
    CorruptError,
    NotFoundError,
    PipelineError,
    RecipeError,
    UntrustedError,
)
from pipeline.stages import Reference, VerdictName

Bench = Any
_OTHER_CARD = "NVIDIA-L4"


def _candidate(bench: Bench, **kwargs: Any) -> Reference:
    reference: Reference = bench.publish(**kwargs)
    bench.accept(reference)
    bench.registry.set_channel(reference, "candidate", bench.card)
    return reference


def test_channel_file_names_the_package(bench: Bench) -> None:
    reference = _candidate(bench)
    path = bench.registry.path / "tiny" / reference.variant / "channels"
    pointer = json.loads((path / f"candidate.{bench.card}.json").read_text())
    assert pointer == {
        "schema": 1,
        "name": "tiny",
        "variant": reference.variant,
        "channel": "candidate",
        "card": bench.card,
        "version": reference.version,
        "digest": reference.digest,
        "seq": 1,
    }


def test_channel_moves_and_counts_its_moves(bench: Bench) -> None:
    first = _candidate(bench)
    assert bench.registry.resolve("tiny:candidate").digest == first.digest
    second = _candidate(bench, label=bench.label("2.0"))
    assert bench.registry.resolve("tiny:candidate").digest == second.digest
    bench.registry.set_channel(second, "candidate", bench.card)  # no move
    (path,) = bench.registry.path.glob("*/*/channels/*.json")
    assert json.loads(path.read_text())["seq"] == 2
    entries = {entry.version: entry.channels for entry in bench.registry.entries()}
    assert entries[first.version] == ()
    assert [pointer.channel for pointer in entries[second.version]] == ["candidate"]


@pytest.mark.parametrize("verdict", ["rejected", "regression", "anomalous", "inconclusive"])
def test_failing_verdict_enters_no_channel(bench: Bench, verdict: VerdictName) -> None:
    reference = bench.publish()
    with pytest.raises(PipelineError, match="no statement"):
        bench.registry.set_channel(reference, "candidate", bench.card)
    bench.accept(reference, verdict=verdict)
    for channel in ("candidate", "mine"):
        with pytest.raises(PipelineError, match=f"newest verdict is {verdict}"):
            bench.registry.set_channel(reference, channel, bench.card)
    assert not list(bench.registry.path.glob("*/*/channels"))


@pytest.mark.parametrize("verdict", ["accepted", "checked", "compiled"])
def test_passing_verdict_enters_candidate(bench: Bench, verdict: VerdictName) -> None:
    reference = bench.publish()
    bench.accept(reference, verdict=verdict)
    bench.registry.set_channel(reference, "candidate", bench.card)
    assert bench.registry.resolve("tiny:candidate").digest == reference.digest


def test_newest_statement_decides(bench: Bench) -> None:
    reference = bench.publish()
    old = bench.accept(reference, verdict="checked", name="z-old")
    os.utime(old, (1_000, 1_000))
    bench.accept(reference, verdict="rejected", name="a-new")
    with pytest.raises(PipelineError, match="newest verdict is rejected"):
        bench.registry.set_channel(reference, "candidate", bench.card)


def test_statement_counts_only_for_its_card(bench: Bench) -> None:
    reference = bench.publish()
    bench.accept(reference)
    with pytest.raises(PipelineError, match="no statement"):
        bench.registry.set_channel(reference, "candidate", _OTHER_CARD)


def test_stable_needs_a_signature(bench: Bench) -> None:
    reference = bench.publish()
    bench.accept(reference, verdict="accepted")
    with pytest.raises(UntrustedError, match="signed test result"):
        bench.registry.set_channel(reference, "stable", bench.card)


@pytest.mark.parametrize("text", ["tiny", "tiny/{v}", "tiny:stable"])
def test_missing_stable_says_that_there_is_a_candidate(bench: Bench, text: str) -> None:
    reference = _candidate(bench)
    text = text.format(v=reference.variant)
    with pytest.raises(NotFoundError, match=f"there is {text.split(':')[0]}:candidate") as raised:
        bench.registry.resolve(text)
    assert raised.value.exit_code == 7


def test_every_kind_of_reference_resolves(bench: Bench) -> None:
    reference = _candidate(bench)
    for text in (
        "tiny:candidate",
        f"tiny/{reference.variant}:candidate",
        f"tiny:{reference.version}",
        str(reference),
        f"tiny@sha256:{reference.digest}",
        f"tiny/{reference.variant}@sha256:{reference.digest}",
    ):
        package = bench.registry.resolve(text)
        assert package.dir == bench.registry.location(reference)
        assert package.digest == reference.digest


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("tinny:candidate", "did you mean tiny"),
        ("phi3", "it has tiny"),
        ("tiny/other:candidate", "no variant other; it has sm89-trtrtx-fp8-b8"),
        ("tiny:1.0-bbbbbbbbbbbc", "there is tiny/sm89-trtrtx-fp8-b8:1.0-bbbbbbbbbbbb"),
        ("tiny:mine", "there is tiny:candidate"),
        (f"tiny@sha256:{'0' * 64}", "enginesmith list"),
        (f"tiny/other@sha256:{'0' * 64}", "enginesmith list"),
    ],
)
def test_missing_reference_says_what_there_is(bench: Bench, text: str, hint: str) -> None:
    _candidate(bench)
    with pytest.raises(NotFoundError, match=hint):
        bench.registry.resolve(text)


def test_empty_registry_says_how_to_fill_it(bench: Bench) -> None:
    with pytest.raises(NotFoundError, match="make engine MODEL=phi3"):
        bench.registry.resolve("phi3")
    assert bench.registry.entries() == []


def test_name_with_several_variants_must_be_made_precise(bench: Bench) -> None:
    small = _candidate(bench)
    big = _candidate(bench, engine=bench.engine(variant="sm89-trtrtx-fp8-b64"))
    with pytest.raises(RecipeError) as raised:
        bench.registry.resolve("tiny:candidate")
    assert str(small) in str(raised.value)
    assert str(big) in str(raised.value)
    assert bench.registry.resolve(f"tiny/{big.variant}:candidate").digest == big.digest
    with pytest.raises(RecipeError):
        bench.registry.resolve(f"tiny:{small.version}")


def test_cards_that_disagree_must_be_told_apart(bench: Bench) -> None:
    first = _candidate(bench)
    second = bench.publish(label=bench.label("2.0"))
    report = {"report.json": bench.report(second, card=_OTHER_CARD)}
    bench.registry.add_statement(second, "test", report)
    bench.registry.set_channel(second, "candidate", _OTHER_CARD)
    with pytest.raises(RecipeError, match=_OTHER_CARD):
        bench.registry.resolve("tiny:candidate")
    assert bench.registry.resolve("tiny:candidate", card=_OTHER_CARD).digest == second.digest
    assert bench.registry.resolve("tiny:candidate", card=bench.card).digest == first.digest
    with pytest.raises(NotFoundError, match="for NVIDIA-H200"):
        bench.registry.resolve("tiny:candidate", card="NVIDIA-H200")


def test_damaged_package_does_not_resolve(bench: Bench) -> None:
    reference = _candidate(bench)
    plan = bench.registry.location(reference) / "engine" / "model.plan"
    plan.chmod(0o644)
    plan.write_bytes(b"PLAN" * 100)
    with pytest.raises(CorruptError, match="SHA-256"):
        bench.registry.resolve("tiny:candidate")
    assert "SHA-256" in bench.registry.entry("tiny:candidate").fault


def test_channel_of_other_bytes_does_not_resolve(bench: Bench) -> None:
    """The version was removed and published again: what was accepted is gone."""
    reference = _candidate(bench)
    shutil.rmtree(bench.registry.location(reference))
    with pytest.raises(NotFoundError, match="has no tiny"):
        bench.registry.resolve("tiny:candidate")
    bench.publish(bench.engine(plan=b"other"))
    with pytest.raises(CorruptError, match="must have digest"):
        bench.registry.resolve("tiny:candidate")


def test_channel_to_a_removed_version_says_so(bench: Bench) -> None:
    _candidate(bench, label=bench.label("2.0"))
    shutil.rmtree(bench.registry.location(_candidate(bench)))
    with pytest.raises(NotFoundError, match="which is gone"):
        bench.registry.resolve("tiny:candidate")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", "../../../elsewhere"),
        ("version", 1),
        ("variant", "other"),
        ("name", "other"),
        ("channel", "stable"),
        ("card", "NVIDIA-L4"),
        ("digest", "0"),
        ("seq", 0),
        ("seq", "1"),
        ("schema", 2),
    ],
)
def test_forged_channel_file_counts_for_nothing(
    bench: Bench, caplog: pytest.LogCaptureFixture, key: str, value: Any
) -> None:
    reference = _candidate(bench)
    (path,) = bench.registry.path.glob("*/*/channels/*.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with caplog.at_level(logging.WARNING), pytest.raises(NotFoundError):
        bench.registry.resolve("tiny:candidate")
    assert str(path) in caplog.text
    with pytest.raises(CorruptError, match="remove it"):
        bench.registry.set_channel(reference, "candidate", bench.card)


def test_channel_file_that_is_a_link_counts_for_nothing(bench: Bench, tmp_path: Path) -> None:
    _candidate(bench)
    (path,) = bench.registry.path.glob("*/*/channels/*.json")
    path.rename(tmp_path / "outside.json")
    path.symlink_to(tmp_path / "outside.json")
    with pytest.raises(NotFoundError):
        bench.registry.resolve("tiny:candidate")
