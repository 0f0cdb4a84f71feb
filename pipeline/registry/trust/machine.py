"""Whom this machine trusts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.registry.trust.policy import TrustPolicy, machine_policy, own_trust


def machine_trust(
    environ: Mapping[str, str], *, own_folder: bool, policy: Path | None = None
) -> TrustPolicy:
    """Whom this machine trusts; makes no key.

    A policy decides alone. Without one, a key that was given to this machine to sign with is
    trusted, since who holds it could sign anything here anyway. A local key counts for this
    machine's own folder registry only, never for S3, OCI or another machine.
    """
    if (loaded := machine_policy(environ, policy)) is not None:
        return loaded
    from pipeline.registry.trust.private_key import signing_key

    key = signing_key(environ, local=own_folder)
    return own_trust(key.public) if key else TrustPolicy()
