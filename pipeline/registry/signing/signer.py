"""Sign packages and verdicts; what is signed lies beside the package, and never changes it.

reference = registry.publish(package, build_statements(package, key, run))
files = {**files, **sign_report(files["report.json"], key)}
registry.add_statement(reference, statement, files)
"""

from __future__ import annotations

import hashlib
import json
import logging
from typing import cast, get_args

from pipeline.core.errors import CorruptError, RecipeError
from pipeline.core.values import Package, VerdictName
from pipeline.registry.manifest import digest_bytes, manifest_bytes
from pipeline.registry.reference import check_digest
from pipeline.registry.signing.attestations import (
    BuildRun,
    provenance_statement,
    result_statement,
    statement_bytes,
)
from pipeline.registry.signing.envelope import MANIFEST_TYPE, STATEMENT_TYPE, sign_envelope
from pipeline.registry.signing.keys import SigningKey
from pipeline.registry.signing.model_signature import MODEL_SIGNATURE, available, sign_engine

log = logging.getLogger(__name__)

MANIFEST_ENVELOPE = "manifest.dsse.json"
PROVENANCE_ENVELOPE = "provenance.dsse.json"
TEST_RESULT_ENVELOPE = "test-result.dsse.json"


def sign_package(package: Package, key: SigningKey, run: BuildRun) -> dict[str, bytes]:
    """Sign a package that was just sealed or verified.

    Returns:
        File name -> content: the envelopes over the manifest and over the provenance.

    Raises:
        CorruptError: The package is not what its digest says.
    """
    data = manifest_bytes(package.manifest)
    if digest_bytes(data) != package.digest:
        raise CorruptError(f"{package.dir} has not the digest {package.digest}; build it again")
    provenance = statement_bytes(provenance_statement(package, run))
    return {
        MANIFEST_ENVELOPE: sign_envelope(data, MANIFEST_TYPE, key),
        PROVENANCE_ENVELOPE: sign_envelope(provenance, STATEMENT_TYPE, key),
    }


def sign_report(report: bytes, key: SigningKey) -> dict[str, bytes]:
    """Sign a verdict.

    Args:
        report: The bytes of `report.json`, as they will be published.
        key: One that may sign verdicts.

    Returns:
        File name -> content; belongs into the statement that holds the report.

    Raises:
        CorruptError: It is no report.
    """
    try:
        value = json.loads(report)
        if value["verdict"] not in get_args(VerdictName):
            raise ValueError(f"verdict {value['verdict']!r}")
        statement = result_statement(
            package_digest=check_digest(value["digest"]),
            card=str(value["card"]),
            verdict=cast(VerdictName, value["verdict"]),
            report_sha256=hashlib.sha256(report).hexdigest(),
        )
    except (ValueError, KeyError, TypeError, RecursionError, RecipeError) as error:
        raise CorruptError(f"report.json cannot be signed: {error!r}") from error
    payload = statement_bytes(statement)
    return {TEST_RESULT_ENVELOPE: sign_envelope(payload, STATEMENT_TYPE, key)}


def build_statements(
    package: Package, key: SigningKey, run: BuildRun
) -> dict[str, dict[str, bytes]]:
    """Everything that is signed about a build: statement name -> its files.

    Goes with `Registry.publish`, so that nobody sees the package without it. The names carry the
    key and the package: what a killed run left behind never stands in the way of other bytes. The
    model signature is left out, with a warning, where the extra `sign` is not installed.

    Args:
        package: Sealed by this process.
        key: Who signs.
        run: What made it.

    Raises:
        CorruptError: As in `sign_package`.
    """
    name = f"{key.label}-{package.digest[:12]}"
    statements = {f"build-{name}": sign_package(package, key, run)}
    if available():
        statements[f"model-{name}"] = {MODEL_SIGNATURE: sign_engine(package.manifest, key)}
    else:
        log.warning(
            "The package gets no model.sig, which other people's tools verify: install it with "
            "pip install '.[sign]'"
        )
    return statements
