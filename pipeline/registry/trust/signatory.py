"""What this machine signs with, and whom it trusts."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.core.errors import UntrustedError
from pipeline.core.values import PASSING, Package, VerdictName
from pipeline.registry.store import RawStatement
from pipeline.registry.trust.keys import SigningKey, config_root, require_signing_key, signing_key
from pipeline.registry.trust.model_signature import MODEL_SIGNATURE, available, sign_engine
from pipeline.registry.trust.policy import TrustPolicy, load_policy, own_trust
from pipeline.registry.trust.provenance import builder, provenance_predicate
from pipeline.registry.trust.statements import sign_statement

log = logging.getLogger(__name__)

POLICY_PATH = "ENGINESMITH_POLICY"
"""Environment variable: path of the trust policy."""


@dataclass(frozen=True, kw_only=True)
class Signatory:
    """What signs the packages and test results of a run, and whom that run trusts.

    Attributes:
        key: Signs.
        trust: Trusts this key, both for builds and for verdicts.
        builder_id: URI of what ran the build; see `pipeline.registry.trust.provenance.builder`.
        invocation_id: Names the run in the builder's logs.
    """

    key: SigningKey
    trust: TrustPolicy
    builder_id: str
    invocation_id: str

    def sign_build(self, package: Package, started: datetime) -> list[RawStatement]:
        """Signature and provenance of a package that this process sealed."""
        predicate = provenance_predicate(
            package.manifest,
            builder_id=self.builder_id,
            invocation_id=self.invocation_id,
            started=started,
            finished=datetime.now(UTC),
        )
        return [
            sign_package(package, self.key),
            sign_statement("provenance", package.digest, {}, self.key, predicate=predicate),
        ]


def sign_package(package: Package, key: SigningKey) -> RawStatement:
    """Vouch for a package that this process sealed or verified.

    `model.sig` is left out, with a warning, where the extra `sign` is not installed.
    """
    if available():
        files = {MODEL_SIGNATURE: sign_engine(package.manifest, key)}
    else:
        log.warning(
            "The package gets no model.sig, which other people's tools verify; to have one, "
            "install the extra: pip install '.[sign]'"
        )
        files = {}
    return sign_statement("signature", package.digest, {}, key, files=files)


def sign_test(
    digest: str,
    key: SigningKey,
    *,
    card: str,
    runtime: tuple[str, str],
    verdict: VerdictName,
    files: Mapping[str, bytes],
    question: str = "",
) -> RawStatement:
    """Sign a test result: an in-toto test result with fields of ours.

    Args:
        digest: The package that was tested.
        key: One that may sign verdicts.
        card: The card that the verdict counts for.
        runtime: Name and version of what ran the engine; as in the manifest if that was its own.
        verdict: The judge's.
        files: `report.json`, `report.html` and `junit.xml`, as they will be published.
        question: Key of the acceptance that was asked, so that it need not be asked again.
    """
    fields = {
        "question": question,
        "card": card,
        "runtime": {"name": runtime[0], "version": runtime[1]},
        "verdict": verdict,
    }
    passed = verdict in PASSING
    predicate: dict[str, Any] = {"result": "PASSED" if passed else "FAILED", "configuration": []}
    return sign_statement("test", digest, fields, key, files=files, predicate=predicate)


def signatory_for(
    environ: Mapping[str, str], run: str, *, own_folder: bool, builds: bool = True
) -> Signatory:
    """Choose and load what signs; the first build of a machine makes a local key and logs that.

    Args:
        environ: Names the key and the policy; in CI also the workflow.
        run: Names the run in this machine's records.
        own_folder: The packages go into a folder of this machine.
        builds: Packages are signed, too; else verdicts alone, which a key of their own may do.

    Raises:
        RecipeError: No key is given where one must be, or it cannot be used.
        UntrustedError: This machine would not trust what it signs.
        AccessError: Another user may read the local key, or none can be made.
    """
    key = require_signing_key(environ, local=own_folder, make=True)
    builder_id, invocation_id = builder(environ, run)
    trust = machine_policy(environ) or own_trust(key.public)
    trust.require_may(key.public, "verdicts")
    if builds:
        trust.require_may(key.public, "builds")
    if builds and trust.builder_ids and builder_id not in trust.builder_ids:
        raise UntrustedError(
            f"this builder is {builder_id}, and the policy trusts {', '.join(trust.builder_ids)} "
            "only; add it to the policy's builder_ids"
        )
    return Signatory(key=key, trust=trust, builder_id=builder_id, invocation_id=invocation_id)


def machine_policy(environ: Mapping[str, str], path: Path | None = None) -> TrustPolicy | None:
    """The trust policy of a machine; None if it has none.

    The command line's (`path`) comes first, then the environment's, then `policy.yaml` in the
    configuration folder.

    Raises:
        RecipeError: It cannot be read.
    """
    if path is not None:
        return load_policy(path)
    if named := environ.get(POLICY_PATH):
        return load_policy(Path(named))
    usual = config_root(environ) / "policy.yaml"
    return load_policy(usual) if os.path.lexists(usual) else None


def machine_trust(
    environ: Mapping[str, str], *, own_folder: bool, policy: Path | None = None
) -> TrustPolicy:
    """Whom this machine trusts; makes no key.

    A policy decides alone. Without one, a key that was given to this machine to sign with is
    trusted, since whoever holds it could sign anything here anyway. A local key counts for this
    machine's own folder registry only, never for S3, OCI or another machine.

    Raises:
        RecipeError: The policy or the key cannot be read.
    """
    if (loaded := machine_policy(environ, policy)) is not None:
        return loaded
    key = signing_key(environ, local=own_folder)
    return own_trust(key.public) if key else TrustPolicy()
