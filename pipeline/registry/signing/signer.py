"""Sign packages and verdicts; what is signed lies beside the package, and never changes it.

reference = registry.publish(package)
add_build_signature(registry, reference, package, key, run)
files = {**files, **sign_report(files["report.json"], key)}      # goes with the acceptance
registry.add_statement(reference, statement, files)
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast, get_args

from pipeline.errors import ConflictError, CorruptError, RecipeError, UntrustedError
from pipeline.registry.backend import Registry
from pipeline.registry.disk import read_bounded
from pipeline.registry.manifest import digest_bytes, manifest_bytes
from pipeline.registry.reference import check_digest
from pipeline.registry.signing.attestations import (
    BuildRun,
    provenance_statement,
    result_statement,
    statement_bytes,
)
from pipeline.registry.signing.envelope import (
    MANIFEST_TYPE,
    MAX_ENVELOPE_BYTES,
    STATEMENT_TYPE,
    parse_envelope,
    sign_envelope,
)
from pipeline.registry.signing.keys import SigningKey
from pipeline.registry.signing.model_signature import (
    MAX_SIGNATURE_BYTES,
    MODEL_SIGNATURE,
    available,
    check_engine_signature,
    sign_engine,
)
from pipeline.stages import Package, Reference, VerdictName

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


def add_build_signature(
    registry: Registry, reference: Reference, package: Package, key: SigningKey, run: BuildRun
) -> Path:
    """Sign a published package, unless this key has.

    Two statements, each named after the key, so that signing again adds nothing: first the model
    signature (left out, with a warning, where the extra `sign` is not installed; a later call adds
    it), then the envelopes, without which the package counts as unsigned.

    Args:
        registry: Where it is published.
        reference: The package there.
        package: The same, sealed or verified by this process.
        key: Who signs.
        run: What made it.

    Returns:
        The folder with the envelopes.

    Raises:
        ConflictError: Something else lies under a statement's name.
        CorruptError: As in `sign_package`.
    """
    signer = key.public.keyid[:12]
    envelopes = sign_package(package, key, run)
    if available():
        files = {MODEL_SIGNATURE: sign_engine(package.manifest, key)}
        _add(
            registry,
            reference,
            f"model-{signer}",
            files,
            lambda folder: _models(folder, package, key),
        )
    else:
        log.warning(
            "%s gets no model.sig: pip install 'enginesmith[sign]', then sign it", reference
        )
    return _add(
        registry,
        reference,
        f"build-{signer}",
        envelopes,
        lambda folder: _signed(folder, package, key),
    )


def _add(
    registry: Registry,
    reference: Reference,
    name: str,
    files: Mapping[str, bytes],
    is_ours: Callable[[Path], bool],
) -> Path:
    """Add a statement, or find the one that an earlier run added.

    ECDSA signatures of the same bytes differ, so the registry sees a conflict where there is none.
    """
    try:
        return registry.add_statement(reference, name, files)
    except ConflictError:
        for found in registry.entry(str(reference)).statements:
            if found.name == name and is_ours(found.dir):
                return found.dir
        raise


def _models(folder: Path, package: Package, key: SigningKey) -> bool:
    path = folder / MODEL_SIGNATURE
    try:
        data = read_bounded(path, MAX_SIGNATURE_BYTES)
        check_engine_signature(data, package.manifest, key.public, str(path))
    except (CorruptError, UntrustedError):
        return False
    return True


def _signed(folder: Path, package: Package, key: SigningKey) -> bool:
    path = folder / MANIFEST_ENVELOPE
    try:
        envelope = parse_envelope(read_bounded(path, MAX_ENVELOPE_BYTES), str(path))
    except (CorruptError, UntrustedError):
        return False
    return (
        envelope.payload_type == MANIFEST_TYPE
        and digest_bytes(envelope.payload) == package.digest
        and envelope.verifies(key.public)
    )
