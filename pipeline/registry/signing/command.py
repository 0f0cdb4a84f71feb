"""What `enginesmith keygen` and `enginesmith verify` do, less the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.commands.answer import Answer
from pipeline.core.values import Package
from pipeline.registry.manifest import MANIFEST
from pipeline.registry.package import verify
from pipeline.registry.reference import STATEMENTS_SUFFIX, reference_of
from pipeline.registry.signing.keys import KEY_PATH, config_root, generate_key, write_key_pair
from pipeline.registry.signing.machine import machine_trust
from pipeline.registry.signing.trust import TrustPolicy, signer_json, told
from pipeline.registry.signing.verification import Verification, verify_signatures
from pipeline.registry.stores.opening import open_registry


def keygen(out: Path | None, environ: Mapping[str, str]) -> Answer:
    """Make a key pair.

    Args:
        out: The private key's file; None for `signing.key` in the configuration folder.
        environ: The environment.

    Returns:
        Where it is and how to use it.

    Raises:
        ConflictError: There is a key already.
    """
    path = out if out is not None else config_root(environ) / "signing.key"
    key = generate_key()
    public = write_key_pair(key, path)
    return Answer(
        value={
            "private_key": str(path.absolute()),
            "public_key": str(public.absolute()),
            "keyid": key.public.keyid,
        },
        shown=[
            f"private key {path} (mode 0600; sign with {KEY_PATH}={path})",
            f"public key  {public} (for the trust policies of those who verify)",
            f"key id      {key.public.keyid}",
        ],
    )


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to verify.

    Attributes:
        target: A reference, or the folder of a package.
        registry: URL or folder where references are looked up.
        policy: File; None for the environment's, then the configuration folder's.
        allow_unsigned: Take a package without any signature.
    """

    target: str
    registry: str
    policy: Path | None = None
    allow_unsigned: bool = False


def run_verify(request: Request, environ: Mapping[str, str]) -> Verification:
    """Verify bytes, signatures and policy of one package.

    Raises:
        CorruptError: Bytes changed.
        UntrustedError: A signature is missing, or by nobody who may sign.
        NotFoundError: No such package.
        RecipeError: Not a reference, or the policy cannot be read.
    """
    if folder := named_folder(request.target):
        trusted = machine_trust(environ, own_folder=True, policy=request.policy)
        package, beside = open_folder(folder, trusted)
    else:
        registry = open_registry(request.registry)
        trusted = machine_trust(environ, own_folder=registry.local, policy=request.policy)
        package = registry.resolve(request.target, policy=trusted)
        beside = registry.statements_dir(reference_of(package))
    return verify_signatures(package, beside, trusted, allow_unsigned=request.allow_unsigned)


def open_folder(folder: Path, policy: TrustPolicy) -> tuple[Package, Path]:
    """A package in a folder, every byte verified, and where the statements about it are.

    The folder is that of a folder registry, with `<folder>.statements` beside it, or what a pull
    left, with `statements/`, `engine/model.sig` and `pull.json` in it.

    Raises:
        CorruptError: It is damaged, or holds something else.
        UntrustedError: `engine/model.sig` is by nobody who may sign builds.
    """
    beside = folder.with_name(f"{folder.name}{STATEMENTS_SUFFIX}")
    if beside.is_dir():
        return verify(folder), beside
    from pipeline.registry.client.layout import STATEMENTS, check_model_signature, verify_layout

    package = verify_layout(folder)
    check_model_signature(folder, package, policy)
    return package, folder / STATEMENTS


def named_folder(target: str) -> Path | None:
    """The folder that was named; None for a reference.

    A reference has no leading dot or slash, and never names a folder with a manifest by accident.
    """
    path = Path(target).expanduser()
    if target.startswith((".", "/", "~")) or (path / MANIFEST).exists():
        return path.resolve()
    return None


def report_lines(done: Verification) -> list[str]:
    """What was checked, for people."""
    size_bytes = sum(file["size"] for file in done.package.manifest["files"])
    signature = (
        f"signed by {told(done.signer)}"
        if done.signer
        else "UNSIGNED, accepted because of --allow-unsigned"
    )
    model = {
        "verified": "verified",
        "absent": "there is none",
        "not checked": "not checked: pip install '.[sign]'",
    }[done.model_signature]
    verdicts = [
        f"verdict     {found.verdict} on {found.card}, signed by {told(found.signer)}"
        for found in done.verdicts
    ]
    return [
        f"package     {reference_of(done.package)}",
        f"digest      sha256:{done.package.digest}",
        f"bytes       all {len(done.package.manifest['files'])} files, {size_bytes} bytes, match",
        f"signature   {signature}",
        f"model.sig   {model}",
        f"provenance  {f'builder {done.builder_id}' if done.builder_id else 'there is none'}",
        *(verdicts or ["verdict     none that is signed"]),
        *(f"ignored     {reason}" for reason in done.ignored),
    ]


def report_json(done: Verification, request: Request) -> dict[str, Any]:
    """The same for programs; later versions only add."""
    return {
        "reference": str(reference_of(done.package)),
        "digest": done.package.digest,
        "package_dir": str(done.package.dir),
        "signer": signer_json(done.signer) if done.signer else None,
        "allow_unsigned": request.allow_unsigned,
        "model_signature": done.model_signature,
        "builder_id": done.builder_id,
        "verdicts": [
            {
                "card": found.card,
                "verdict": found.verdict,
                "statement": found.statement,
                "signer": signer_json(found.signer),
            }
            for found in done.verdicts
        ],
        "ignored": list(done.ignored),
    }
