"""What was pulled, believed and not known: a value, and `pull.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pipeline import __version__
from pipeline.registry.client.deliver import Origin
from pipeline.registry.client.machine import Facts
from pipeline.registry.resolve import Resolved
from pipeline.registry.select import Chosen


@dataclass(frozen=True, kw_only=True)
class Pulled:
    """A package that is ready to be loaded.

    Attributes:
        chosen: The package, why it was taken, and the other ones with the reason.
        dir: Folder with `manifest.json` and `engine/`.
        registry: Where it was looked up.
        origin: How it came; `verified`: a folder that was only verified.
        facts: Of the machine: given, probed, unknown.
        fetched_bytes: Sent by the registry, now.
        seconds: Wall clock.
    """

    chosen: Chosen
    dir: Path
    registry: str
    origin: Origin | Literal["verified"]
    facts: Facts
    fetched_bytes: int = 0
    seconds: float = 0.0

    @property
    def resolved(self) -> Resolved:
        """The package with what was verified about it."""
        return self.chosen.resolved

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of its manifest."""
        return self.resolved.package.digest

    @property
    def manifest(self) -> Mapping[str, Any]:
        """Parsed and checked."""
        return self.resolved.package.manifest

    @property
    def engine_dir(self) -> Path:
        """What a runtime loads."""
        return self.dir / "engine"

    @property
    def size_bytes(self) -> int:
        """All files of the package."""
        return sum(file["size"] for file in self.manifest["files"])

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "reference": str(self.resolved.place),
            "digest": self.digest,
            "dir": str(self.dir.absolute()),
            "came_from": self.origin,
            "size_bytes": self.size_bytes,
            "fetched_bytes": self.fetched_bytes,
            "seconds": round(self.seconds, 3),
            "serve_args": list(self.manifest["serve"]["args"]),
            "runtime": dict(self.manifest["match"]["runtime"]),
            "format": self.manifest["format"],
            "rejected": list(self.chosen.rejected),
            **self._believed(),
        }

    def receipt(self) -> bytes:
        """`pull.json`; when and by which version, too."""
        value = {
            "schema": 1,
            "reference": str(self.resolved.place),
            "digest": self.digest,
            "pulled": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "enginesmith": __version__,
            **self._believed(),
        }
        return (json.dumps(value, indent=1) + "\n").encode()

    def _believed(self) -> dict[str, Any]:
        proof, verification = self.chosen.proof, self.resolved.verification
        signer, yank = verification.signer, self.resolved.yank
        return {
            "registry": self.registry,
            "signer": signer.to_json() if signer else None,
            "unsigned_allowed": signer is None,
            "builder_id": verification.builder_id or None,
            "verdicts": [one.to_json() for one in verification.verdicts],
            "verdict": proof.verdict,
            "proven": proof.kind,
            "unproven_accepted": proof.kind == "unproven",
            "proven_cards": list(proof.cards),
            "facts": self.facts.to_json(),
            "unknown": list(self.chosen.unknown),
            "ignored": list(verification.ignored),
            "yanked_accepted": str(yank) if yank else None,
        }
