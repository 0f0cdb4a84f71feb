"""The OpenSSF model signature over `engine/`, as `model.sig` in a Sigstore bundle.

The stock tool verifies it wherever that folder is:

    model_signing verify key engine --public_key KEY.pub --signature engine/model.sig

It is for that tool. We trust the signed statement that lies beside it, which names the package's
digest, so that of every file, and the SHA-256 of `model.sig` itself.

We hand the library the digests of the manifest, which sealing a package has just computed from
every byte, instead of letting it read everything again. That also means that nothing is left out:
by itself it skips `.git*` files.

Needs the extra `sign`: `model-signing` brings some twenty packages and takes 0.3 s to import
(measured on 2026-11-25).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.registry.manifest import ENGINE
from pipeline.registry.trust.keys import SigningKey

MODEL_SIGNATURE = "model.sig"


def available() -> bool:
    """Whether the extra `sign` is installed."""
    return all(importlib.util.find_spec(name) for name in ("model_signing", "OpenSSL"))


def sign_engine(manifest: Mapping[str, Any], key: SigningKey) -> bytes:
    """Sign the files of `engine/`; needs `available()`.

    Returns:
        The Sigstore bundle, without a transparency log: nothing is sent anywhere.
    """
    from model_signing.signing import Config

    with tempfile.TemporaryDirectory() as folder, _as_file(key.private_pem()) as private:
        bundle = Path(folder, MODEL_SIGNATURE)
        signer = Config().use_elliptic_key_signer(private_key=private)
        signer.set_hashing_config(_known_digests(manifest)).sign(ENGINE, bundle)
        return bundle.read_bytes()


@dataclass(frozen=True)
class _KnownDigests:
    """Stands in for the library's hashing configuration: the digests are known."""

    listed: Any  # model_signing.manifest.Manifest

    def hash(self, model_path: Any, *, files_to_hash: Any = None) -> Any:
        return self.listed


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
