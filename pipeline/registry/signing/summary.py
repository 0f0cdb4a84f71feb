"""Who signed a package, for people who look at it: told, never enforced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.core.errors import CorruptError, UntrustedError
from pipeline.core.values import Package
from pipeline.registry.backend import Entry
from pipeline.registry.signing.trust import TrustPolicy
from pipeline.registry.signing.verification import verify_signatures


@dataclass(frozen=True, kw_only=True)
class Signatures:
    """What `enginesmith verify` would say of the signatures.

    Attributes:
        signer: Name of the trusted signer of the build; None if there is none.
        keyid: Id of the signer's key.
        identity: The name in the signer's certificate; None for a key that the policy names.
        reason: Why nobody is believed; empty if somebody is.
        verdicts: Statement -> name of the trusted signer of its verdict.
    """

    signer: str | None = None
    keyid: str | None = None
    identity: str | None = None
    reason: str = ""
    verdicts: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.signer is None:
            return self.reason
        by = f"{self.identity}, " if self.identity else ""
        return f"signed by {self.signer} ({by}key {str(self.keyid)[:12]}), trusted here"

    def to_json(self) -> dict[str, Any]:
        """For programs; later versions only add."""
        return {
            "trusted": self.signer is not None,
            "signer": self.signer,
            "keyid": self.keyid,
            "identity": self.identity,
            "reason": self.reason or None,
            "verdicts": dict(self.verdicts),
        }


def signatures_of(entry: Entry, statements_dir: Path, policy: TrustPolicy) -> Signatures:
    """Check the signatures of a version against a policy; its bytes are not read.

    Args:
        entry: From a registry.
        statements_dir: What was said about it.
        policy: Whom to believe.
    """
    if entry.manifest is None or entry.digest is None:
        return Signatures(reason="damaged, so no signature says anything")
    package = Package(dir=Path(entry.where), manifest=entry.manifest, digest=entry.digest)
    try:
        done = verify_signatures(package, statements_dir, policy, allow_unsigned=True)
    except (UntrustedError, CorruptError) as error:
        return Signatures(reason=f"not trusted: {error}")
    if done.signer is None:
        return Signatures(reason="unsigned")
    return Signatures(
        signer=done.signer.name,
        keyid=done.signer.key.keyid,
        identity=done.signer.identity,
        verdicts={found.statement: found.signer.name for found in done.verdicts},
    )
