"""What was pulled, believed and not known: for people, for programs and as `pull.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pipeline import __version__
from pipeline.core.errors import ExitCode
from pipeline.registry.client.machine import Facts
from pipeline.registry.client.select import Chosen
from pipeline.registry.lifecycle.yank import told
from pipeline.registry.signing.verification import ModelSignature

Came = Literal["registry", "cache", "present", "verified"]


@dataclass(frozen=True, kw_only=True)
class Pulled:
    """A package that is ready to be loaded.

    Attributes:
        reference: `name/variant:version`.
        digest: SHA-256 (hex) of its manifest.
        dir: Folder with `manifest.json` and `engine/`; None never.
        manifest: Parsed.
        registry: Where it was looked up.
        came: `registry`: fetched now. `cache`: fetched before. `present`: it was there already.
            `verified`: a folder that was only verified.
        size_bytes: All files of the package.
        fetched_bytes: Sent by the registry, now.
        signer: Who signed the build; None if it is unsigned, which was explicitly allowed.
        signer_keyid: SHA-256 of that key; None likewise.
        model_signature: State of the OpenSSF model signature.
        verdict: The passing verdict on this card; None if there is none.
        proven: `unproven` only where that was explicitly accepted; `unknown` without a card.
        proven_cards: All cards with a passing signed verdict.
        facts: Of the machine: given, probed, unknown.
        unknown: What must be so for the engine to run, and nobody knows.
        rejected: Other versions that the reference could mean, with the reason.
        ignored: Statements that do not count, with the reason.
        yanked: By whom and why, where it was taken all the same, as was explicitly allowed.
        seconds: Wall clock.
    """

    reference: str
    digest: str
    dir: Path
    manifest: Mapping[str, Any]
    registry: str
    came: Came
    size_bytes: int
    fetched_bytes: int
    signer: str | None
    signer_keyid: str | None
    model_signature: ModelSignature
    verdict: str | None
    proven: str
    proven_cards: tuple[str, ...]
    facts: Facts
    unknown: tuple[str, ...]
    rejected: tuple[str, ...]
    ignored: tuple[str, ...]
    seconds: float
    yanked: str = ""

    @property
    def engine_dir(self) -> Path:
        """What a runtime loads."""
        return self.dir / "engine"

    def to_json(self) -> dict[str, Any]:
        """For programs; later versions only add."""
        return {
            "schema": 1,
            "exit_code": int(ExitCode.OK),
            "reference": self.reference,
            "digest": self.digest,
            "dir": str(self.dir.absolute()),
            "came_from": self.came,
            "size_bytes": self.size_bytes,
            "fetched_bytes": self.fetched_bytes,
            "seconds": round(self.seconds, 3),
            "serve_args": list(self.manifest["serve"]["args"]),
            "runtime": dict(self.manifest["match"]["runtime"]),
            "format": self.manifest["format"],
            "rejected": list(self.rejected),
            **self._believed(),
        }

    def receipt(self) -> bytes:
        """`pull.json`; when and by which version, too."""
        value = {
            "schema": 1,
            "reference": self.reference,
            "digest": self.digest,
            "pulled": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "enginesmith": __version__,
            **self._believed(),
        }
        return (json.dumps(value, indent=1) + "\n").encode()

    def _believed(self) -> dict[str, Any]:
        signer = {"name": self.signer, "keyid": self.signer_keyid} if self.signer else None
        return {
            "registry": self.registry,
            "signer": signer,
            "unsigned_allowed": self.signer is None,
            "model_signature": self.model_signature,
            "verdict": self.verdict,
            "proven": self.proven,
            "unproven_accepted": self.proven == "unproven",
            "proven_cards": list(self.proven_cards),
            "facts": self.facts.to_json(),
            "unknown": list(self.unknown),
            "ignored": list(self.ignored),
            "yanked_accepted": self.yanked or None,
        }

    def lines(self) -> list[str]:
        """For people."""
        signed = f"{self.signer} (key {str(self.signer_keyid)[:12]})" if self.signer else ""
        megabytes = f"{self.size_bytes / 1e6:.1f} MB"
        how = {
            "registry": f"fetched {self.fetched_bytes / 1e6:.1f} MB in {self.seconds:.1f} s",
            "cache": "from the cache",
            "present": "it was there already",
            "verified": "verified where it is",
        }[self.came]
        needs = self.manifest["match"]["runtime"]
        return [
            f"package   {self.reference}",
            f"digest    sha256:{self.digest}",
            f"bytes     {megabytes}, every byte verified; {how}",
            f"signed    {signed or 'UNSIGNED, accepted because of --allow-unsigned'}",
            f"verdict   {self._verdict_line()}",
            *([f"yanked    YANKED {self.yanked}; --allow-yanked"] if self.yanked else []),
            f"runtime   {needs['name']} {needs['version']}",
            f"engine    {self.engine_dir}",
            *(f"unknown   {text}" for text in self.unknown),
            *(f"rejected  {text}" for text in self.rejected),
            *(f"ignored   {text}" for text in self.ignored),
        ]

    def _verdict_line(self) -> str:
        if self.proven == "proven":
            return f"{self.verdict} on {self.facts.card}"
        cards = ", ".join(self.proven_cards) or "no card"
        if self.proven == "unproven":
            return f"UNPROVEN here, accepted because of --accept-unproven; passed on {cards}"
        return f"passed on {cards}; the card here is not known"


def pulled(
    chosen: Chosen,
    *,
    dir: Path,
    registry: str,
    came: Came,
    facts: Facts,
    fetched_bytes: int = 0,
    seconds: float = 0.0,
) -> Pulled:
    """What is told of a choice."""
    judged = chosen.judged
    candidate, verification = judged.candidate, judged.candidate.verification
    signer = verification.signer
    return Pulled(
        reference=candidate.what,
        digest=candidate.package.digest,
        dir=dir,
        manifest=candidate.package.manifest,
        registry=registry,
        came=came,
        size_bytes=sum(file["size"] for file in candidate.package.manifest["files"]),
        fetched_bytes=fetched_bytes,
        signer=signer.name if signer else None,
        signer_keyid=signer.key.keyid if signer else None,
        model_signature=verification.model_signature,
        verdict=judged.proof.verdict,
        proven=judged.proof.kind,
        proven_cards=judged.proof.cards,
        facts=facts,
        unknown=judged.unknown,
        rejected=chosen.rejected,
        ignored=verification.ignored,
        seconds=seconds,
        yanked=told(candidate.yank) if candidate.yank else "",
    )
