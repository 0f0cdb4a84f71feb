"""What is said about a package, in the words of in-toto: pure builders of plain values.

Both are statements of the in-toto attestation framework, version 1, whose subject is the package:
the SHA-256 of its `manifest.json`. Sealed into an envelope (`statement_bytes`, `sign_envelope`),
they are SLSA provenance v1 (slsa.dev/spec/v1.0/provenance) and an in-toto test result v0.1
(in-toto/attestation, spec/predicates/test-result.md). Fields of our own start with `enginesmith_`,
as SLSA asks of extensions; other readers skip them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import rfc8785

from pipeline.core.errors import UntrustedError
from pipeline.core.values import PASSING, Package, VerdictName
from pipeline.registry.manifest import MANIFEST

_STATEMENT = "https://in-toto.io/Statement/v1"
PROVENANCE = "https://slsa.dev/provenance/v1"
TEST_RESULT = "https://in-toto.io/attestation/test-result/v0.1"
BUILD_TYPE = "https://enginesmith.dev/build/v1"
"""Names the meaning of `externalParameters`: the recipe's name and its resolved configuration. An
identifier, not a page."""


@dataclass(frozen=True, kw_only=True)
class BuildRun:
    """The run that made a package.

    Attributes:
        builder_id: URI of who ran it, such as a CI workflow; the policy may name those it believes.
        builder_version: Of this program.
        invocation_id: Names the run in the builder's logs.
        started: With time zone.
        finished: With time zone.
    """

    builder_id: str
    builder_version: str
    invocation_id: str
    started: datetime
    finished: datetime


def provenance_statement(package: Package, run: BuildRun) -> dict[str, Any]:
    """SLSA provenance v1 of a package: from what, by whom, with which settings and tools."""
    manifest = package.manifest
    source = manifest["source"]
    digest = {"gitCommit": source["commit"]} if source["commit"] else {}
    weights: dict[str, Any] = {
        "name": "weights",
        "uri": source["origin"],
        # Identity of all files of the weights, not of one: no digest in the sense of in-toto.
        "annotations": {"enginesmith_files_digest": source["digest"]},
    }
    if digest:
        weights["digest"] = digest
    predicate = {
        "buildDefinition": {
            "buildType": BUILD_TYPE,
            "externalParameters": external_parameters(manifest),
            "internalParameters": {
                "build_key": manifest["build_key"],
                "tools": dict(manifest["build"]["tools"]),
            },
            "resolvedDependencies": [weights],
        },
        "runDetails": {
            "builder": {
                "id": run.builder_id,
                "version": {"enginesmith": run.builder_version},
            },
            "metadata": {
                "invocationId": run.invocation_id,
                "startedOn": _time(run.started),
                "finishedOn": _time(run.finished),
            },
        },
    }
    return _statement(package.digest, PROVENANCE, predicate)


def external_parameters(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What the user chose; a verifier compares it with the manifest."""
    return {"recipe": manifest["name"], "config": dict(manifest["build"]["config"])}


def result_statement(
    *, package_digest: str, card: str, verdict: VerdictName, report_sha256: str
) -> dict[str, Any]:
    """An in-toto test result: one acceptance of a package, bound to its `report.json`.

    Args:
        package_digest: The package that was judged.
        card: The card that the verdict counts for.
        verdict: The judge's word.
        report_sha256: Of the bytes of `report.json`; the report cannot be exchanged then.
    """
    predicate = {
        "result": "PASSED" if verdict in PASSING else "FAILED",
        # Required: what the test was set up with. The report names workloads and conditions.
        "configuration": [{"name": "report.json", "digest": {"sha256": report_sha256}}],
        "enginesmith_card": card,
        "enginesmith_verdict": verdict,
    }
    return _statement(package_digest, TEST_RESULT, predicate)


def statement_bytes(statement: Mapping[str, Any]) -> bytes:
    """RFC 8785 canonical JSON: equal statements, equal bytes."""
    return rfc8785.dumps(dict(statement))


def parse_statement(data: bytes, predicate_type: str, digest: str, origin: str) -> dict[str, Any]:
    """The predicate of a statement about one package.

    Args:
        data: Payload of an envelope whose signature was checked.
        predicate_type: The kind that is wanted.
        digest: The package that it must speak of, and of no other.
        origin: Where it comes from, for messages.

    Raises:
        UntrustedError: It is of another kind, or speaks of something else.
    """
    try:
        value = json.loads(data)
        kinds = (value["_type"], value["predicateType"])
        subjects = [subject["digest"]["sha256"] for subject in value["subject"]]
        predicate = value["predicate"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UntrustedError(f"{origin} is not an in-toto statement: {error!r}") from error
    if kinds != (_STATEMENT, predicate_type) or not isinstance(predicate, dict):
        raise UntrustedError(f"{origin} is a statement of type {kinds[1]!r}, not {predicate_type}")
    if subjects != [digest]:
        raise UntrustedError(f"{origin} speaks of another package than {digest[:12]}")
    return predicate


def _statement(digest: str, predicate_type: str, predicate: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "_type": _STATEMENT,
        "subject": [{"name": MANIFEST, "digest": {"sha256": digest}}],
        "predicateType": predicate_type,
        "predicate": dict(predicate),
    }


def _time(moment: datetime) -> str:
    """RFC 3339 in UTC, whole seconds, as in-toto's Timestamp."""
    if moment.tzinfo is None:
        raise ValueError(f"{moment} has no time zone")
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
