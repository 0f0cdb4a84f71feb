"""The frozen values of what is published: all that a client of a registry needs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import rfc8785

Redistribution = Literal["allowed", "with-notice", "forbidden"]
"""What a licence says about passing the weights on, quantized or not."""


def digest_of(value: Any) -> str:
    """SHA-256 (hex) of the RFC 8785 canonical JSON of `value`."""
    return hashlib.sha256(rfc8785.dumps(value)).hexdigest()


@dataclass(frozen=True, kw_only=True)
class FileDigest:
    """One file of a folder: POSIX path relative to that folder, size and SHA-256 (hex)."""

    path: str
    size_bytes: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path, "size": self.size_bytes, "sha256": self.sha256}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> FileDigest:
        return cls(path=value["path"], size_bytes=value["size"], sha256=value["sha256"])


@dataclass(frozen=True, kw_only=True)
class Package:
    """A sealed folder: `engine/` and `manifest.json`, whose bytes have the SHA-256 `digest`."""

    dir: Path
    manifest: Mapping[str, Any]
    digest: str

    @property
    def engine_dir(self) -> Path:
        return self.dir / "engine"

    @property
    def size_bytes(self) -> int:
        return sum(file["size"] for file in self.manifest["files"])


Failing = Literal["rejected", "regression", "anomalous", "inconclusive"]
VerdictName = Literal["accepted", "checked", "compiled", Failing, "measured"]
"""`measured`: a race, which measures speed only; like a failing verdict it enters no channel."""
PASSING: frozenset[VerdictName] = frozenset({"accepted", "checked", "compiled"})


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Where a published package is: `name/variant:version` and its digest."""

    name: str
    variant: str
    version: str
    digest: str

    def __str__(self) -> str:
        return f"{self.name}/{self.variant}:{self.version}"
