"""The OpenSSF model signature over `engine/`, as `model.sig` in a Sigstore bundle.

The stock tool verifies it wherever that folder is:

    model_signing verify key engine --public_key KEY.pub --signature engine/model.sig
    model_signing verify certificate engine --certificate_chain CA.pem --signature engine/model.sig

the second where the signer has a certificate. That tool takes any leaf of the authority, and looks
at its dates as of the day it begins; we take the names that the policy has, and look at today.

We hand the library the digests of the manifest, which sealing or verifying a package has just
computed from every byte, instead of letting it read everything again. That also means that nothing
is left out: by itself it skips `.git*` files, and follows what a bundle says to ignore.

Needs the extra `sign`: `model-signing` brings some twenty packages and takes 0.3 s to import
(measured on 2026-11-25), while trust rests on the envelope over the manifest, which needs neither.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import IncompatibleError, UntrustedError
from pipeline.registry.manifest import ENGINE
from pipeline.registry.signing.certificate import (
    CertificateError,
    parse_chain,
    pem_of,
    split_chain,
)
from pipeline.registry.signing.keys import PublicKey, SigningKey
from pipeline.registry.signing.trust import Signer, TrustPolicy

MODEL_SIGNATURE = "model.sig"
MAX_SIGNATURE_BYTES = 16 << 20
"""Far above that of 30,000 files."""
_UNREADABLE = (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError)
"""What the library raises for a bundle that is none."""


def available() -> bool:
    """Whether the extra `sign` is installed."""
    return all(importlib.util.find_spec(name) for name in ("model_signing", "OpenSSL"))


def sign_engine(manifest: Mapping[str, Any], key: SigningKey) -> bytes:
    """Sign the files of `engine/`.

    Args:
        manifest: Of a package that was just sealed or verified.
        key: Who signs.

    Returns:
        The Sigstore bundle, without a transparency log: nothing is sent anywhere.

    Raises:
        IncompatibleError: The extra `sign` is not installed.
    """
    _require()
    from model_signing.signing import Config

    with contextlib.ExitStack() as files:
        bundle = Path(files.enter_context(tempfile.TemporaryDirectory()), MODEL_SIGNATURE)
        private = files.enter_context(_as_file(key.private_pem()))
        intermediates = b""
        if key.certificates:
            leaf, intermediates = split_chain(key.certificates)
            signer = Config().use_certificate_signer(
                private_key=private,
                signing_certificate=files.enter_context(_as_file(leaf)),
                # The library wants one more in any case; the leaf's second copy is taken out below.
                certificate_chain=[files.enter_context(_as_file(intermediates or leaf))],
            )
        else:
            signer = Config().use_elliptic_key_signer(private_key=private)
        signer.set_hashing_config(_known_digests(manifest)).sign(ENGINE, bundle)
        data = bundle.read_bytes()
        return data if not key.certificates or intermediates else _leaf_alone(data)


def believed_engine_signature(
    data: bytes, manifest: Mapping[str, Any], policy: TrustPolicy, origin: str
) -> Signer:
    """Check that somebody who may sign builds signed exactly these files of `engine/`.

    Args:
        data: `model.sig`.
        manifest: Of a package whose bytes were verified.
        policy: Whom to believe.
        origin: Where `data` comes from, for messages.

    Returns:
        Who did.

    Raises:
        UntrustedError: Nobody who may, or `data` is no such signature.
        IncompatibleError: The extra `sign` is not installed.
    """
    fault = UntrustedError(
        f"{origin} shows no certificate, and the policy names no key that may sign builds"
    )
    for key in policy.keys:
        if policy.may(key, "builds"):
            try:
                check_engine_signature(data, manifest, key.key, origin)
            except UntrustedError as error:
                fault = error
            else:
                return key
    if shown := _shown(data):
        try:
            chain = parse_chain(shown)
        except CertificateError as error:
            raise UntrustedError(f"{origin}: its certificate {error}") from error
        found, reason = policy.judge(chain.key.keyid, shown, "builds")
        if found is None:
            raise UntrustedError(f"{origin}: {reason}")
        check_engine_signature(data, manifest, found.key, origin)
        return found
    raise fault


def check_engine_signature(
    data: bytes, manifest: Mapping[str, Any], key: PublicKey, origin: str
) -> None:
    """Check that a key signed exactly the files of `engine/` that the manifest lists.

    Args:
        data: `model.sig`.
        manifest: Of a package whose bytes were verified.
        key: The one key that is believed; what the bundle says of keys counts for nothing.
        origin: Where `data` comes from, for messages.

    Raises:
        UntrustedError: It did not, or `data` is no such signature.
        IncompatibleError: The extra `sign` is not installed.
    """
    _require()
    from cryptography.exceptions import InvalidSignature
    from model_signing.verifying import Config

    with tempfile.TemporaryDirectory() as folder, _as_file(key.pem) as public:
        bundle = Path(folder, MODEL_SIGNATURE)
        bundle.write_bytes(_for_key(data, key))
        verifier = Config().use_elliptic_key_verifier(public_key=public)
        verifier.set_hashing_config(_known_digests(manifest))
        try:
            # The library complains of old bundles on stdout, where our JSON goes.
            with contextlib.redirect_stdout(None):
                verifier.verify(ENGINE, bundle)
        except (InvalidSignature, *_UNREADABLE) as error:
            known = str(error).startswith(("Signature mismatch", "Key mismatch"))
            reason = str(error) if known else "it is damaged, or another key signed it"
            raise UntrustedError(
                f"{origin} is not a model signature of these files by key {key.keyid[:12]}: "
                f"{reason}; pull or sign the package again"
            ) from error


def _leaf_alone(data: bytes) -> bytes:
    bundle = json.loads(data)
    del bundle["verificationMaterial"]["x509CertificateChain"]["certificates"][1:]
    return json.dumps(bundle).encode()


def _shown(data: bytes) -> bytes:
    """The certificates in a bundle, PEM, leaf first; empty if there are none to be read."""
    try:
        chain = json.loads(data)["verificationMaterial"]["x509CertificateChain"]["certificates"]
        return b"".join(pem_of(base64.b64decode(one["rawBytes"])) for one in chain)
    except _UNREADABLE:
        return b""


def _for_key(data: bytes, key: PublicKey) -> bytes:
    """The bundle as the library's check by one key wants it, also where it names a certificate.

    Who holds the key was decided before; the bundle's word for it counts for nothing.
    """
    if not _shown(data):
        return data
    bundle = json.loads(data)
    hint = hashlib.sha256(key.pem).hexdigest()  # the library's own, over the PEM
    bundle["verificationMaterial"] = {"publicKey": {"hint": hint}, "tlogEntries": []}
    return json.dumps(bundle).encode()


def _require() -> None:
    if not available():
        raise IncompatibleError(
            "model signatures need packages that are not installed: pip install '.[sign]'"
        )


@dataclass(frozen=True)
class _KnownDigests:
    """Stands in for the library's hashing configuration: the digests are known."""

    listed: Any  # model_signing.manifest.Manifest

    def hash(self, model_path: Any, *, files_to_hash: Any = None) -> Any:
        return self.listed

    def add_ignored_paths(self, *, model_path: Any, paths: Any) -> None:
        """A bundle may ask to leave files out; none is."""


def _known_digests(manifest: Mapping[str, Any]) -> _KnownDigests:
    from model_signing._hashing.hashing import Digest
    from model_signing.manifest import Manifest, SerializationType

    how = SerializationType.from_args(
        {"method": "files", "hash_type": "sha256", "allow_symlinks": False}
    )
    items = [
        how.new_item(
            file["path"].removeprefix(f"{ENGINE}/"),
            Digest("sha256", bytes.fromhex(file["sha256"])),
        )
        for file in manifest["files"]
    ]
    return _KnownDigests(Manifest(ENGINE, items, how))


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
