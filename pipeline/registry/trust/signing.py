"""What this machine signs with, and what: packages, their provenance, test results, yanks, moves.

A package's signature brings `model.sig`, an OpenSSF model signature over `engine/`, for the stock
tool (docs/trust.md): we trust the statement beside it. Its library gets the manifest's digests, so
that nothing is left out (by itself it skips `.git*` files). It needs the extra `sign`: some twenty
packages, 0.3 s to import (measured on 2026-11-25).
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import importlib.util
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import rfc8785
from cryptography.hazmat.primitives.asymmetric import ec

from pipeline import __version__
from pipeline.core.errors import ConflictError, UntrustedError
from pipeline.core.ownership import make_own
from pipeline.core.published import PASSING, Package, Reference, VerdictName
from pipeline.registry.disk import disk_errors
from pipeline.registry.manifest import ENGINE
from pipeline.registry.store import ENVELOPE, RawStatement
from pipeline.registry.trust import statements
from pipeline.registry.trust.policy import (
    KEYGEN,
    ROLES,
    PublicKey,
    TrustPolicy,
    key_fault,
    machine_policy,
    own_trust,
)
from pipeline.registry.trust.private_key import (
    KEY_PATH,
    KEY_TEXT,
    SigningKey,
    local_key,
    signing_key,
)
from pipeline.registry.trust.statements import MODEL_SIGNATURE, Kind, Statement

log = logging.getLogger(__name__)

BUILD_TYPE = "https://enginesmith.dev/build/v1"
LOCAL_BUILDER = "https://enginesmith.dev/builder/local/v1"
"""SLSA builder id of a build that a person started on a machine of theirs; the key tells which."""
_TIMESTAMP = "%Y-%m-%dT%H:%M:%SZ"
"""In-toto's Timestamp: RFC 3339 in UTC, whole seconds."""


def generate_key() -> SigningKey:
    """A new key pair."""
    return SigningKey(private=ec.generate_private_key(ec.SECP256R1()))


def write_key_pair(key: SigningKey, path: Path) -> Path:
    """Write a private key, mode 0600, and its public half beside it, whose path it returns.

    ConflictError if one of the two files exists, AccessError if they cannot be written.
    """
    public = path.with_name(f"{path.name}.pub")
    for target in (path, public):
        if os.path.lexists(target):
            raise _taken(target)
    folder = path.absolute().parent
    with disk_errors(f"write {path}"):
        make_own(folder, "--out")
        # The public half last: what is half done has the half that it can be made again from.
        pair = ((path, key.private_pem(), 0o600), (public, key.public.pem, 0o644))
        for target, data, mode in pair:
            with tempfile.NamedTemporaryFile(prefix=".key-", dir=folder) as stream:
                os.fchmod(stream.fileno(), mode)
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
                try:
                    os.link(stream.name, target)
                except FileExistsError:
                    raise _taken(target) from None
    return public


def _taken(path: Path) -> ConflictError:
    return ConflictError(f"{path} exists; it stays as it is, so choose another with --out")


def require_signing_key(
    environ: Mapping[str, str], *, local: bool, make: bool = False
) -> SigningKey:
    """As `signing_key`, where there must be one; a RecipeError if not.

    A missing local key is made where it counts, and that is logged.
    """
    given = environ.get(KEY_PATH) or environ.get(KEY_TEXT)
    own = local_key(environ) if make and local and not given else None
    if own is not None and not os.path.lexists(own):
        with contextlib.suppress(ConflictError):  # another build made it meanwhile
            write_key_pair(generate_key(), own)
            log.info(
                "Made a key for this machine's own packages: %s (mode 0600). It counts here only; "
                "to sign for others, make one with enginesmith keygen",
                own,
            )
    if (key := signing_key(environ, local=local)) is not None:
        return key
    raise key_fault(
        KEY_PATH,
        "no key is given to sign with, and this machine's local key counts for a folder of its own "
        f"only, and never in CI; {KEYGEN} and set this variable to its path",
    )


def actor_of(environ: Mapping[str, str]) -> str:
    """Who acts, for people: `$ENGINESMITH_ACTOR`, else CI's user, else the login name."""
    for name in ("ENGINESMITH_ACTOR", "GITHUB_ACTOR", "GITLAB_USER_LOGIN"):
        if environ.get(name):
            return environ[name]
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user that /etc/passwd does not know
        return f"uid-{os.getuid()}"


def sign_statement(
    kind: Kind,
    digest: str,
    fields: Mapping[str, Any],
    key: SigningKey,
    *,
    files: Mapping[str, bytes] | None = None,
    predicate: Mapping[str, Any] | None = None,
    after: str = "",
) -> RawStatement:
    """Sign a statement about the package of a digest, with the fields of its kind.

    `files` go beside the envelope, other tools read `predicate`, and the signed time is later than
    `after`, should this clock be behind.
    """
    beside = dict(files or {})
    ours = {
        "schema": statements.SCHEMA,
        "kind": kind,
        "signed_at": now_text(after),
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in beside.items()},
        **fields,
    }
    payload = rfc8785.dumps(
        {
            "_type": statements.STATEMENT_TYPE,
            "subject": [{"name": "manifest.json", "digest": {"sha256": digest}}],
            "predicateType": statements.KINDS[kind][0],
            "predicate": {**(predicate or {}), statements.OURS: ours},
        }
    )
    envelope = sign_envelope(payload, key)
    name = f"{kind}-{hashlib.sha256(envelope).hexdigest()[:16]}"
    return RawStatement(name=name, files={ENVELOPE: envelope, **beside})


def sign_envelope(payload: bytes, key: SigningKey) -> bytes:
    """A DSSE envelope around the bytes of an in-toto statement."""
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA
    from cryptography.hazmat.primitives.hashes import SHA256
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import Signature

    envelope = Envelope(payload, statements.PAYLOAD_TYPE, {})
    signature = key.private.sign(envelope.pae(), ECDSA(SHA256()))
    keyid = key.public.keyid
    envelope.signatures[keyid] = Signature(keyid, signature.hex())
    return rfc8785.dumps(envelope.to_dict())


def now_text(after: str = "") -> str:
    """The time now, as statements state it; a microsecond after `after` if that is not past yet."""
    now = datetime.now(UTC)
    if after and now.strftime(statements.SIGNED_TIME) <= after:
        now = datetime.strptime(after, statements.SIGNED_TIME).replace(tzinfo=UTC) + timedelta(
            microseconds=1
        )
    return now.strftime(statements.SIGNED_TIME)


def sign_again(one: Statement, key: SigningKey, files: Mapping[str, bytes]) -> RawStatement:
    """The same statement by another key, signed now."""
    ours = {"schema", "kind", "signed_at", "files"}
    fields = {name: value for name, value in one.fields.items() if name not in ours}
    predicate = {name: value for name, value in one.predicate.items() if name != statements.OURS}
    return sign_statement(one.kind, one.digest, fields, key, files=files, predicate=predicate)


def place_fields(reference: Reference) -> dict[str, str]:
    """The fields of a yank or a move that name its package."""
    return {name: getattr(reference, name) for name in ("name", "variant", "version")}


def sign_package(package: Package, key: SigningKey) -> RawStatement:
    """Vouch for a package that this process sealed or verified; `model.sig` needs the extra."""
    files = {}
    if can_sign_models():
        files[MODEL_SIGNATURE] = sign_engine(package.manifest, key)
    else:
        log.warning(
            "The package gets no model.sig, which other people's tools verify; to have one, "
            "install the extra: pip install '.[sign]'"
        )
    return sign_statement("signature", package.digest, {}, key, files=files)


def can_sign_models() -> bool:
    """Whether the extra `sign` is installed."""
    return all(importlib.util.find_spec(name) for name in ("model_signing", "OpenSSL"))


def sign_engine(manifest: Mapping[str, Any], key: SigningKey) -> bytes:
    """The Sigstore bundle of `engine/`, without a transparency log: nothing is sent anywhere."""
    from model_signing._hashing.hashing import Digest
    from model_signing.manifest import Manifest, SerializationType
    from model_signing.signing import Config

    how = SerializationType.from_args(
        {"method": "files", "hash_type": "sha256", "allow_symlinks": False}
    )
    items = [
        how.new_item(
            file["path"].removeprefix(f"{ENGINE}/"), Digest("sha256", bytes.fromhex(file["sha256"]))
        )
        for file in manifest["files"]
    ]
    listed = Manifest(ENGINE, items, how)
    # In place of the library's hashing configuration.
    known = SimpleNamespace(hash=lambda model_path, *, files_to_hash=None: listed)
    with tempfile.TemporaryDirectory() as folder, _as_file(key.private_pem()) as private:
        bundle = Path(folder, MODEL_SIGNATURE)
        signer = Config().use_elliptic_key_signer(private_key=private)
        signer.set_hashing_config(known).sign(ENGINE, bundle)
        return bundle.read_bytes()


@contextlib.contextmanager
def _as_file(data: bytes) -> Iterator[Path]:
    """A path that gives `data` once: the library wants files, and keys should not lie on disks."""
    read, write = os.pipe()
    try:
        with os.fdopen(write, "wb") as stream:
            stream.write(data)  # a key is smaller than a pipe's buffer
        yield Path(f"/dev/fd/{read}")
    finally:
        os.close(read)


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
    """Sign an in-toto test result of a package, with fields of ours.

    The verdict counts for the card and the runtime (name, version). `files` are the report's, as
    they will be published; `question` is the key of the acceptance that was asked.
    """
    ran = {"name": runtime[0], "version": runtime[1]}
    fields = {"question": question, "card": card, "runtime": ran, "verdict": verdict}
    result = "PASSED" if verdict in PASSING else "FAILED"
    predicate: dict[str, Any] = {"result": result, "configuration": []}
    return sign_statement("test", digest, fields, key, files=files, predicate=predicate)


@dataclass(frozen=True, kw_only=True)
class Signatory:
    """What signs the packages and test results of a run, and whom that run trusts.

    `builder_id` is the URI of what ran the build, `invocation_id` names the run in its logs.
    """

    key: SigningKey
    trust: TrustPolicy
    builder_id: str
    invocation_id: str

    def sign_build(self, package: Package, started: datetime) -> list[RawStatement]:
        """Signature, and SLSA provenance v1 (slsa.dev/spec/v1.0/provenance) that ends now."""
        source, build = package.manifest["source"], package.manifest["build"]
        weights: dict[str, Any] = {
            "name": "weights",
            "uri": source["origin"],
            # Identity of all files of the weights, not of one: no digest in the sense of in-toto.
            "annotations": {"enginesmith_files_digest": source["digest"]},
        }
        if source["commit"]:
            weights["digest"] = {"gitCommit": source["commit"]}
        predicate = {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {
                    "recipe": package.manifest["name"],
                    "config": build["config"],
                },
                "internalParameters": {
                    "build_key": package.manifest["build_key"],
                    "tools": build["tools"],
                },
                "resolvedDependencies": [weights],
            },
            "runDetails": {
                "builder": {"id": self.builder_id, "version": {"enginesmith": __version__}},
                "metadata": {
                    "invocationId": self.invocation_id,
                    "startedOn": started.astimezone(UTC).strftime(_TIMESTAMP),
                    "finishedOn": datetime.now(UTC).strftime(_TIMESTAMP),
                },
            },
        }
        return [
            sign_package(package, self.key),
            sign_statement("provenance", package.digest, {}, self.key, predicate=predicate),
        ]


def signatory_for(
    environ: Mapping[str, str], run: str, *, own_folder: bool, builds: bool = True
) -> Signatory:
    """Choose and load what signs `run`; the first build of a machine makes a local key.

    `own_folder`: packages go into a folder of this machine. Without `builds`: verdicts alone.
    RecipeError if no key is given where one must be, UntrustedError if this machine would not trust
    what it signs; else raises like `signing_key`.
    """
    key = require_signing_key(environ, local=own_folder, make=True)
    builder_id, invocation_id = builder_of(environ, run)
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


def builder_of(environ: Mapping[str, str], run: str) -> tuple[str, str]:
    """SLSA builder and invocation id: in GitHub Actions workflow and attempt, else `run` here."""
    server, repository = environ.get("GITHUB_SERVER_URL"), environ.get("GITHUB_REPOSITORY")
    workflow, run_id = environ.get("GITHUB_WORKFLOW_REF"), environ.get("GITHUB_RUN_ID")
    if environ.get("GITHUB_ACTIONS") == "true" and server and repository and workflow and run_id:
        attempt = environ.get("GITHUB_RUN_ATTEMPT", "1")
        invocation = f"{server}/{repository}/actions/runs/{run_id}/attempts/{attempt}"
        return f"{server}/{workflow}", invocation
    return LOCAL_BUILDER, run


def policy_text(names: Mapping[str, PublicKey]) -> str:
    """A policy file that gives every right to each of these keys."""
    import yaml

    keys = [
        {"name": name, "public_key": key.pem.decode(), "may_sign": list(ROLES)}
        for name, key in names.items()
    ]
    value = {"schema": 1, "keys": keys, "revoked_keys": [], "revoked_digests": []}
    return yaml.safe_dump(value, sort_keys=False)
