"""Statements: their names follow from their bytes, and every change of a byte is seen."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import rfc8785

from pipeline.core.errors import CorruptError, RecipeError, UntrustedError
from pipeline.registry.trust.signing import now_text, sign_envelope, sign_statement
from pipeline.registry.trust.statements import open_statement, verified_files
from tests.registry.packages import place_of
from tests.registry.team import Team

DIGEST = "d" * 64


def payload_of(envelope: bytes) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(base64.b64decode(json.loads(envelope)["payload"]))
    return value


def test_a_statement_reads_back_and_is_named_by_its_payload(team: Team) -> None:
    files = {"report.json": b"{}"}
    fields = {"card": "L4", "verdict": "accepted"}
    raw = sign_statement("test", DIGEST, fields, team.tester, files=files)
    found = open_statement(raw.envelope, team.policy)
    assert (found.kind, found.digest, found.signer.name) == ("test", DIGEST, "tester")
    assert found.name == raw.name
    assert found.part("card") == "L4"
    assert found.files == {"report.json": hashlib.sha256(b"{}").hexdigest()}
    again = sign_statement("test", DIGEST, fields, team.tester, files=files)
    assert again.name != raw.name  # signed at another time


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        ("signature", "tester"),
        ("provenance", "releaser"),
        ("test", "builder"),
        ("yank", "builder"),
        ("move", "tester"),
    ],
)
def test_every_kind_needs_the_right_of_its_own(team: Team, kind: Any, wrong: str) -> None:
    raw = sign_statement(kind, DIGEST, {}, getattr(team, wrong))
    with pytest.raises(UntrustedError, match="may not sign"):
        open_statement(raw.envelope, team.policy)


def test_every_changed_byte_of_an_envelope_is_seen(team: Team) -> None:
    envelope = sign_statement("test", DIGEST, {"card": "L4"}, team.tester).envelope
    wanted = open_statement(envelope, team.policy)
    for at in range(len(envelope)):
        changed = bytearray(envelope)
        changed[at] ^= 1
        try:
            found = open_statement(bytes(changed), team.policy)
        except UntrustedError:
            continue
        assert found == wanted  # a byte that no reader looks at, such as a letter's case in hex


@pytest.mark.parametrize(
    ("ours", "change"),
    [
        (False, {"_type": "https://in-toto.io/Statement/v0.1"}),
        (False, {"predicateType": "https://slsa.dev/provenance/v1"}),
        (False, {"subject": [{"digest": {"sha256": DIGEST}}, {"digest": {"sha256": "e" * 64}}]}),
        (True, {"schema": 2}),
        (True, {"kind": "rumour"}),
        (True, {"signed_at": "2026-11-25T09:00:00Z"}),
        (True, {"signed_at": "2026-13-25T09:00:00.000000Z"}),
        (True, {"files": {"../x": "a" * 64}}),
        (True, {"files": {f"f{number}": "a" * 64 for number in range(17)}}),
    ],
)
def test_what_is_signed_in_another_form_is_no_statement(
    team: Team, ours: bool, change: Any
) -> None:
    value = payload_of(sign_statement("test", DIGEST, {}, team.tester).envelope)
    (value["predicate"]["enginesmith_statement"] if ours else value).update(change)
    envelope = sign_envelope(rfc8785.dumps(value), team.tester)
    with pytest.raises(UntrustedError, match="not a statement of ours"):
        open_statement(envelope, team.policy)


@pytest.mark.parametrize("payload", [b"", b"[]", b"\xff", b"[" * 100_000, b'{"predicate": 1}'])
def test_a_signed_payload_that_is_no_json_object_is_no_statement(
    team: Team, payload: bytes
) -> None:
    with pytest.raises(UntrustedError):
        open_statement(sign_envelope(payload, team.tester), team.policy)


@pytest.mark.parametrize("text", ["two\nlines", "\x1b[31mred", "x" * 501])
def test_text_that_is_not_one_printable_line_is_neither_signed_nor_shown(
    team: Team, text: str
) -> None:
    with pytest.raises(RecipeError, match="reason"):
        team.releasing(reason=text)
    raw = sign_statement("yank", DIGEST, {"reason": text, "card": text}, team.releaser)
    found = open_statement(raw.envelope, team.policy)
    with pytest.raises(UntrustedError, match="reason"):
        found.text("reason")
    with pytest.raises(UntrustedError, match="card"):
        found.part("card")


def test_a_file_that_is_not_what_was_signed_is_not_given_out(team: Team) -> None:
    package = team.publish()
    place, raw = place_of(package), team.test(package, "rejected")
    found = open_statement(raw.envelope, team.policy)
    assert verified_files(found, team.store, place) == {"report.json": b"{}", "report.html": b"<p>"}
    (report,) = Path(team.store.url).rglob("report.html")
    for change in (lambda: report.write_bytes(b"ACCEPTED"), report.unlink):
        report.chmod(0o644)
        change()
        with pytest.raises(CorruptError, match=r"report\.html"):
            verified_files(found, team.store, place)


def test_a_clock_that_is_behind_still_signs_later_than_what_it_follows() -> None:
    ahead = "2199-01-01T00:00:00.999999Z"
    assert now_text(ahead) == "2199-01-01T00:00:01.000000Z"
    assert now_text() < ahead
