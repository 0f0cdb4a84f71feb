from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import (
    CorruptError,
    NotAcceptedError,
    NotFoundError,
    RecipeError,
    UntrustedError,
)
from pipeline.core.values import Reference, VerdictName
from pipeline.registry.lifecycle.records import Author
from pipeline.registry.lifecycle.yank import yank_package
from pipeline.registry.signing.trust import TrustPolicy

Bench = Any
_OTHER_CARD = "NVIDIA-L4"


def _candidate(bench: Bench, **kwargs: Any) -> Reference:
    reference: Reference = bench.publish(**kwargs)
    bench.approve(reference)
    bench.enter(reference, "candidate", bench.card)
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
        "move": f"candidate.{bench.card}.000001.dsse.json",
        "actor": "ada",
        "reason": "",
        "at": pointer["at"],
    }
    assert (path / "log" / pointer["move"]).is_file()


def test_channel_moves_and_counts_its_moves(bench: Bench) -> None:
    first = _candidate(bench)
    assert bench.resolve("tiny:candidate").digest == first.digest
    second = _candidate(bench, label=bench.label("2.0"))
    assert bench.resolve("tiny:candidate").digest == second.digest
    bench.enter(second, "candidate", bench.card)  # no move
    (path,) = bench.registry.path.glob("*/*/channels/*.json")
    assert json.loads(path.read_text())["seq"] == 2
    entries = {entry.version: entry.channels for entry in bench.registry.entries(bench.policy)}
    assert entries[first.version] == ()
    assert [pointer.channel for pointer in entries[second.version]] == ["candidate"]


@pytest.mark.parametrize("verdict", ["rejected", "regression", "anomalous", "inconclusive"])
def test_failing_verdict_enters_no_channel(bench: Bench, verdict: VerdictName) -> None:
    reference = bench.publish()
    bench.sign(reference)
    with pytest.raises(UntrustedError, match="no signed test result"):
        bench.enter(reference, "candidate", bench.card)
    bench.approve(reference, verdict=verdict)
    for channel in ("candidate", "mine"):
        with pytest.raises(NotAcceptedError, match=f"newest signed verdict is {verdict}"):
            bench.enter(reference, channel, bench.card)
    assert not list(bench.registry.path.glob("*/*/channels"))


@pytest.mark.parametrize("verdict", ["accepted", "checked", "compiled"])
def test_passing_verdict_enters_candidate(bench: Bench, verdict: VerdictName) -> None:
    reference = bench.publish()
    bench.approve(reference, verdict=verdict)
    bench.enter(reference, "candidate", bench.card)
    assert bench.resolve("tiny:candidate").digest == reference.digest


def test_newest_statement_decides(bench: Bench) -> None:
    reference = bench.publish()
    old = bench.approve(reference, verdict="checked", name="z-old")
    os.utime(old, (1_000, 1_000))
    bench.approve(reference, verdict="rejected", name="a-new")
    with pytest.raises(NotAcceptedError, match="newest signed verdict is rejected"):
        bench.enter(reference, "candidate", bench.card)


def test_statement_counts_only_for_its_card(bench: Bench) -> None:
    reference = bench.publish()
    bench.approve(reference)
    with pytest.raises(UntrustedError, match="no signed test result for this card"):
        bench.enter(reference, "candidate", _OTHER_CARD)


def test_nothing_that_is_unsigned_enters_a_channel(bench: Bench) -> None:
    reference = bench.publish()
    bench.accept(reference, verdict="accepted")
    for channel in ("candidate", "stable"):
        with pytest.raises(UntrustedError, match="not signed"):
            bench.enter(reference, channel)
    bench.sign(reference)
    with pytest.raises(UntrustedError, match="its verdict is not signed"):
        bench.enter(reference)
    assert not list(bench.registry.path.glob("*/*/channels"))


@pytest.mark.parametrize("text", ["tiny", "tiny/{v}", "tiny:stable"])
def test_missing_stable_says_that_there_is_a_candidate(bench: Bench, text: str) -> None:
    reference = _candidate(bench)
    text = text.format(v=reference.variant)
    with pytest.raises(NotFoundError, match=f"there is {text.split(':')[0]}:candidate") as raised:
        bench.resolve(text)
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
        package = bench.resolve(text)
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
        bench.resolve(text)


def test_empty_registry_says_how_to_fill_it(bench: Bench) -> None:
    with pytest.raises(NotFoundError, match="make engine MODEL=phi3"):
        bench.resolve("phi3")
    assert bench.registry.entries(bench.policy) == []


def test_name_with_several_variants_must_be_made_precise(bench: Bench) -> None:
    small = _candidate(bench)
    big = _candidate(bench, engine=bench.engine(variant="sm89-trtrtx-fp8-b64"))
    with pytest.raises(RecipeError) as raised:
        bench.resolve("tiny:candidate")
    assert str(small) in str(raised.value)
    assert str(big) in str(raised.value)
    assert bench.resolve(f"tiny/{big.variant}:candidate").digest == big.digest
    with pytest.raises(RecipeError):
        bench.resolve(f"tiny:{small.version}")


def test_cards_that_disagree_must_be_told_apart(bench: Bench) -> None:
    first = _candidate(bench)
    second = bench.publish(label=bench.label("2.0"))
    bench.approve(second, card=_OTHER_CARD)
    bench.enter(second, "candidate", _OTHER_CARD)
    with pytest.raises(RecipeError, match=_OTHER_CARD):
        bench.resolve("tiny:candidate")
    assert bench.resolve("tiny:candidate", card=_OTHER_CARD).digest == second.digest
    assert bench.resolve("tiny:candidate", card=bench.card).digest == first.digest
    with pytest.raises(NotFoundError, match="for NVIDIA-H200"):
        bench.resolve("tiny:candidate", card="NVIDIA-H200")


def test_damaged_package_does_not_resolve(bench: Bench) -> None:
    reference = _candidate(bench)
    plan = bench.registry.location(reference) / "engine" / "model.plan"
    plan.chmod(0o644)
    plan.write_bytes(b"PLAN" * 100)
    with pytest.raises(CorruptError, match="SHA-256"):
        bench.resolve("tiny:candidate")
    assert "SHA-256" in bench.registry.entry("tiny:candidate", policy=bench.policy).fault


def test_channel_of_other_bytes_does_not_resolve(bench: Bench) -> None:
    """The version was removed and published again: what was accepted is gone."""
    reference = _candidate(bench)
    shutil.rmtree(bench.registry.location(reference))
    with pytest.raises(NotFoundError, match="has no tiny"):
        bench.resolve("tiny:candidate")
    bench.publish(bench.engine(plan=b"other"))
    with pytest.raises(CorruptError, match="must have digest"):
        bench.resolve("tiny:candidate")


def test_channel_to_a_removed_version_says_so(bench: Bench) -> None:
    _candidate(bench, label=bench.label("2.0"))
    shutil.rmtree(bench.registry.location(_candidate(bench)))
    with pytest.raises(NotFoundError, match="which is gone"):
        bench.resolve("tiny:candidate")


@pytest.mark.parametrize("damage", ["changed", "removed", "a link", "rubbish"])
def test_what_lies_beside_the_log_changes_nothing(
    bench: Bench, tmp_path: Path, damage: str
) -> None:
    good = _candidate(bench)
    other = bench.publish(label=bench.label("2.0"))
    (path,) = bench.registry.path.glob("*/*/channels/*.json")
    value = {**json.loads(path.read_text()), "version": other.version, "digest": other.digest}
    path.unlink()
    if damage == "changed":
        path.write_text(json.dumps(value))
    elif damage == "a link":
        (tmp_path / "outside.json").write_text(json.dumps(value))
        path.symlink_to(tmp_path / "outside.json")
    elif damage == "rubbish":
        path.write_bytes(b"\xff")
    assert bench.resolve("tiny:candidate").digest == good.digest
    entries = {entry.version: entry.channels for entry in bench.registry.entries(bench.policy)}
    assert [one.channel for one in entries[good.version]] == ["candidate"]
    assert entries[other.version] == ()
    bench.approve(other)
    bench.enter(other)
    assert json.loads(path.read_text())["digest"] == other.digest


def test_pointer_without_a_log_counts_for_nothing_and_is_told(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    _candidate(bench)
    (moves,) = bench.registry.path.glob("*/*/channels/log")
    shutil.rmtree(moves)
    with caplog.at_level(logging.WARNING), pytest.raises(NotFoundError):
        bench.resolve("tiny:candidate")
    assert "no signed move says so" in caplog.text
    assert [entry.channels for entry in bench.registry.entries(bench.policy)] == [()]


def test_channel_by_somebody_who_is_not_trusted_is_refused_and_left_out_of_lists(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    reference = _candidate(bench)
    stranger = TrustPolicy()
    with pytest.raises(UntrustedError, match="not trusted here"):
        bench.registry.resolve("tiny:candidate", None, stranger)
    with caplog.at_level(logging.WARNING):
        (entry,) = bench.registry.entries(stranger)
    assert entry.channels == ()
    assert "is left out" in caplog.text
    assert bench.registry.resolve(str(reference), None, stranger).digest == reference.digest


def test_yank_is_told_of_an_entry_only_if_a_trusted_key_signed_it(bench: Bench) -> None:
    reference = bench.publish()
    author = Author(key=bench.key, actor="ada", reason="crashes")
    yank_package(bench.registry.store, reference, author, bench.policy)
    (entry,) = bench.registry.entries(bench.policy)
    assert re.fullmatch(r"by ada at \S+: crashes", entry.yanked)
    assert bench.registry.entry(str(reference), None, bench.policy).yanked == entry.yanked
    (entry,) = bench.registry.entries(TrustPolicy())
    assert entry.yanked == ""
