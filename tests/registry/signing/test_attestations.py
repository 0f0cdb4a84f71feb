from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest

from pipeline.core.errors import UntrustedError
from pipeline.core.values import VerdictName
from pipeline.registry.signing.attestations import (
    PROVENANCE,
    TEST_RESULT,
    parse_statement,
    provenance_statement,
    result_statement,
    statement_bytes,
)
from tests.registry.signing.conftest import RUN

Bench = Any


def _package(bench: Bench) -> Any:
    return bench.registry.resolve(f"tiny:{bench.publish().version}")


def test_provenance_is_what_slsa_says(bench: Bench) -> None:
    package = _package(bench)
    statement = provenance_statement(package, RUN)
    assert statement["subject"] == [{"name": "manifest.json", "digest": {"sha256": package.digest}}]
    definition = statement["predicate"]["buildDefinition"]
    assert definition["externalParameters"] == {
        "recipe": "tiny",
        "config": {"quantizer": {"calib_size": 64}},
    }
    (weights,) = definition["resolvedDependencies"]
    assert weights["uri"] == "hub:someone/tiny"
    assert weights["digest"] == {"gitCommit": "0" * 40}
    assert statement["predicate"]["runDetails"] == {
        "builder": {"id": "https://ci.example/build", "version": {"enginesmith": "0.1"}},
        "metadata": {
            "invocationId": "run-1",
            "startedOn": "2026-11-25T09:00:00Z",
            "finishedOn": "2026-11-25T09:05:00Z",
        },
    }


def test_reference_library_of_in_toto_reads_both(bench: Bench) -> None:
    pytest.importorskip("in_toto_attestation", reason="comes with the extra `sign`")
    from google.protobuf import json_format
    from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
    from in_toto_attestation.v1 import statement_pb2
    from in_toto_attestation.v1.statement import Statement

    package = _package(bench)
    for statement in (
        provenance_statement(package, RUN),
        result_statement(
            package_digest=package.digest, card="L4", verdict="checked", report_sha256="0" * 64
        ),
    ):
        message = json_format.Parse(statement_bytes(statement), statement_pb2.Statement())
        Statement.copy_from_pb(message).validate()
    predicate = provenance_statement(package, RUN)["predicate"]
    json_format.Parse(json.dumps(predicate), provenance_pb2.Provenance())


@pytest.mark.parametrize(
    ("verdict", "result"),
    [("accepted", "PASSED"), ("checked", "PASSED"), ("compiled", "PASSED"), ("rejected", "FAILED")],
)
def test_result_follows_the_verdict(verdict: VerdictName, result: str) -> None:
    statement = result_statement(
        package_digest="a" * 64, card="L4", verdict=verdict, report_sha256="b" * 64
    )
    assert statement["predicate"] == {
        "result": result,
        "configuration": [{"name": "report.json", "digest": {"sha256": "b" * 64}}],
        "enginesmith_card": "L4",
        "enginesmith_verdict": verdict,
    }


def test_equal_statements_have_equal_bytes(bench: Bench) -> None:
    package = _package(bench)
    one = provenance_statement(package, RUN)
    other = dict(reversed(list(provenance_statement(package, RUN).items())))
    assert statement_bytes(one) == statement_bytes(other)


def test_time_without_zone_is_a_bug(bench: Bench) -> None:
    with pytest.raises(ValueError, match="time zone"):
        provenance_statement(_package(bench), replace(RUN, started=datetime(2026, 1, 1)))


def test_statement_of_another_kind_or_package_is_refused() -> None:
    statement = result_statement(
        package_digest="a" * 64, card="L4", verdict="accepted", report_sha256="b" * 64
    )
    data = statement_bytes(statement)
    assert parse_statement(data, TEST_RESULT, "a" * 64, "x") == statement["predicate"]
    with pytest.raises(UntrustedError, match="of type"):
        parse_statement(data, PROVENANCE, "a" * 64, "x")
    with pytest.raises(UntrustedError, match="another package"):
        parse_statement(data, TEST_RESULT, "c" * 64, "x")
    two = {**statement, "subject": [*statement["subject"], {"digest": {"sha256": "c" * 64}}]}
    with pytest.raises(UntrustedError, match="another package"):
        parse_statement(statement_bytes(two), TEST_RESULT, "c" * 64, "x")
    for broken in (b"", b"[]", b"{}", b"[" * 100_000, b'{"_type":1,"subject":[7]}'):
        with pytest.raises(UntrustedError, match="not an in-toto"):
            parse_statement(broken, TEST_RESULT, "a" * 64, "x")
