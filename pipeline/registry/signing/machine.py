"""What this machine signs with, whom it believes, and what it says of itself."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pipeline import __version__
from pipeline.core.errors import Fault, RecipeError, UntrustedError
from pipeline.core.values import Package
from pipeline.registry.signing.attestations import BuildRun
from pipeline.registry.signing.certificate import require_may_still_sign
from pipeline.registry.signing.keys import (
    KEY_PATH,
    KeyChoice,
    SigningKey,
    choose_key,
    config_root,
    load_key,
)
from pipeline.registry.signing.policy_file import load_policy
from pipeline.registry.signing.signer import build_statements, sign_report
from pipeline.registry.signing.trust import OwnKey, TrustPolicy, trust_for

log = logging.getLogger(__name__)

POLICY_PATH = "ENGINESMITH_POLICY"
"""Environment variable: path of the trust policy."""
LOCAL_BUILDER = "https://enginesmith.dev/builder/local/v1"
"""SLSA builder id of a build that a person started on a machine of theirs; the key tells which. An
identifier, not a page."""


@dataclass(frozen=True, kw_only=True)
class Signatory:
    """Who signs the packages and verdicts of a run, and whom that run believes.

    Attributes:
        key: What signs.
        trust: Believes this key, both for builds and for verdicts.
        builder_id: As in `BuildRun`.
        invocation_id: As in `BuildRun`.
    """

    key: SigningKey
    trust: TrustPolicy
    builder_id: str
    invocation_id: str

    def build_statements(self, package: Package, started: datetime) -> dict[str, dict[str, bytes]]:
        """Sign a package that was just sealed; see `signer.build_statements`.

        Raises:
            UntrustedError: The certificate ended during the build.
        """
        require_may_still_sign(self.key)
        run = BuildRun(
            builder_id=self.builder_id,
            builder_version=__version__,
            invocation_id=self.invocation_id,
            started=started,
            finished=datetime.now(UTC),
        )
        return build_statements(package, self.key, run)

    def sign_report(self, report: bytes) -> dict[str, bytes]:
        """Sign a verdict; see `signer.sign_report`.

        Raises:
            UntrustedError: The certificate ended during the measurement.
        """
        require_may_still_sign(self.key)
        return sign_report(report, self.key)

    def statement_name(self, name: str) -> str:
        """The name of a statement by this signer, which no other signer's takes."""
        return f"{name}-{self.key.label}"


def signatory_for(
    environ: Mapping[str, str], run: str, *, own_folder: bool, builds: bool = True
) -> Signatory:
    """Choose and load what signs; the first build of a machine makes a local key, and says so.

    Args:
        environ: Names the key and the policy; in CI also the workflow.
        run: Names the run in this machine's records.
        own_folder: The packages go into a folder of this machine.
        builds: Packages are signed, too; else verdicts alone, which a key of their own may do.

    Raises:
        RecipeError: No key is given where one must be, or it cannot be used.
        UntrustedError: This machine would not believe what it signs.
        AccessError: Somebody else may read the local key, or none can be made.
    """
    choice = choose_key(environ)
    if choice.kind == "local" and not own_folder:
        fault = (
            "no key is given to sign with, and this machine's local key counts for a folder of its "
            "own only; make one with enginesmith keygen and set this variable to its path"
        )
        raise RecipeError([Fault(KEY_PATH, fault)])
    key = _loaded(choice, environ)
    own = OwnKey(key=key.public, local=choice.kind == "local")
    builder_id, invocation_id = builder(environ, run)
    trust = trust_for(machine_policy(environ), own, own_folder=own_folder)
    require_believed(trust, key, builder_id if builds else None)
    return Signatory(key=key, trust=trust, builder_id=builder_id, invocation_id=invocation_id)


def _loaded(choice: KeyChoice, environ: Mapping[str, str]) -> SigningKey:
    made = choice.kind == "local" and choice.path and not os.path.lexists(choice.path)
    key = load_key(choice, environ)
    if made:
        log.info(
            "Made a key for this machine's own packages: %s (mode 0600, key %s). It counts here "
            "only; to sign for others, make one with enginesmith keygen",
            choice.path,
            key.public.keyid[:12],
        )
    return key


def require_believed(trust: TrustPolicy, key: SigningKey, builder_id: str | None) -> None:
    """Stop a run, before any work, whose package or verdict this machine would not take.

    Args:
        trust: Whom this machine believes.
        key: What signs.
        builder_id: What builds; None where nothing is built.

    Raises:
        UntrustedError: The policy does not let this key sign, or this builder build.
    """
    if builder_id is not None:
        trust.require_may(key.public, "builds")
    trust.require_may(key.public, "verdicts")
    if builder_id is not None and trust.builder_ids and builder_id not in trust.builder_ids:
        raise UntrustedError(
            f"this builder is {builder_id}, and the policy believes {', '.join(trust.builder_ids)} "
            "only; add it to the policy's builder_ids"
        )


def builder(environ: Mapping[str, str], run: str) -> tuple[str, str]:
    """Builder and invocation id of a build; pure.

    In GitHub Actions both come from its default environment variables: the workflow file at its
    ref, and the attempt of the run.
    """
    server, repository = environ.get("GITHUB_SERVER_URL"), environ.get("GITHUB_REPOSITORY")
    workflow, run_id = environ.get("GITHUB_WORKFLOW_REF"), environ.get("GITHUB_RUN_ID")
    if environ.get("GITHUB_ACTIONS") == "true" and server and repository and workflow and run_id:
        attempt = environ.get("GITHUB_RUN_ATTEMPT", "1")
        invocation = f"{server}/{repository}/actions/runs/{run_id}/attempts/{attempt}"
        return f"{server}/{workflow}", invocation
    return LOCAL_BUILDER, run


def machine_policy(environ: Mapping[str, str], path: Path | None = None) -> TrustPolicy | None:
    """The trust policy of a machine; None if it has none.

    Args:
        environ: The environment.
        path: From the command line; comes first, then the environment's, then `policy.yaml` in the
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
    """Whom this machine believes; makes no key.

    Args:
        environ: The environment.
        own_folder: The package lies in a folder of this machine (`Store.local`).
        policy: From the command line.

    Raises:
        RecipeError: The policy or the key cannot be read.
    """
    loaded = machine_policy(environ, policy)
    own = _own_key(environ) if loaded is None else None
    return trust_for(loaded, own, own_folder=own_folder)


def _own_key(environ: Mapping[str, str]) -> OwnKey | None:
    try:
        choice = choose_key(environ)
    except RecipeError:
        return None  # CI without a key signs nothing
    local = choice.kind == "local"
    if local and choice.path is not None and not choice.path.exists():
        return None
    return OwnKey(key=load_key(choice, environ, make=False, certified=False).public, local=local)
