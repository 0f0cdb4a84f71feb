"""What was said about a package, and the channels that point to packages.

Statements lie beside the package, never in it, and each names the digest that it speaks of: a
statement about other bytes counts for nothing. A channel is a pointer per card; it moves, and its
`seq` grows by one with every move.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from pipeline.core.errors import CorruptError, RecipeError
from pipeline.core.values import PASSING, Finding, Reference, VerdictName
from pipeline.registry.disk import read_bounded
from pipeline.registry.reference import check_digest, check_part

REPORT = "report.json"
_MAX_REPORT_BYTES = 16 << 20
_MAX_POINTER_BYTES = 64 << 10
_FINDING_KINDS = frozenset({"rejected", "regression", "anomalous", "inconclusive", "note"})


@dataclass(frozen=True, kw_only=True)
class Statement:
    """One folder below `<version>.statements/`.

    Attributes:
        name: The folder's name.
        dir: The folder.
        made_s: When it was written, Unix time; orders statements for people.
        digest: The package that it speaks of; empty if it has no readable report.
        card: The card that it counts for.
        verdict: None if it holds no readable report, such as a statement of provenance.
        findings: What acceptance noticed.
        fault: Why its report cannot be read.
    """

    name: str
    dir: Path
    made_s: float
    digest: str = ""
    card: str = ""
    verdict: VerdictName | None = None
    findings: tuple[Finding, ...] = ()
    fault: str = ""

    @property
    def passed(self) -> bool:
        return self.verdict in PASSING


@dataclass(frozen=True, kw_only=True)
class Pointer:
    """`channels/<channel>.<card>.json`: which package a channel means for a card.

    Attributes:
        channel: Such as `candidate`.
        card: As NVML calls it, spaces as dashes.
        reference: The package.
        seq: 1 for the first move, then one more for each.
    """

    channel: str
    card: str
    reference: Reference
    seq: int

    @property
    def file(self) -> str:
        """Its file's name."""
        return f"{self.channel}.{self.card}.json"

    def path(self, root: Path) -> Path:
        """Where it lies in a folder registry."""
        return root / self.reference.name / self.reference.variant / "channels" / self.file

    def to_bytes(self) -> bytes:
        """The file's content, readable for people."""
        value = {
            "schema": 1,
            "name": self.reference.name,
            "variant": self.reference.variant,
            "channel": self.channel,
            "card": self.card,
            "version": self.reference.version,
            "digest": self.reference.digest,
            "seq": self.seq,
        }
        return (json.dumps(value, indent=1) + "\n").encode()


def read_statements(folder: Path) -> list[Statement]:
    """All statements of one version, newest first; one that cannot be read says so itself."""
    if not folder.is_dir():
        return []
    folders = (path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
    statements = [_read_statement(path) for path in folders]
    return sorted(statements, key=lambda found: (found.made_s, found.name), reverse=True)


def _read_statement(folder: Path) -> Statement:
    statement = Statement(name=folder.name, dir=folder, made_s=folder.stat().st_mtime)
    if not (folder / REPORT).exists():
        return statement
    try:
        report = _read_object(folder / REPORT, _MAX_REPORT_BYTES)
        verdict, findings = report["verdict"], report["findings"]
        if report["schema"] != 1 or verdict not in get_args(VerdictName):
            raise CorruptError(f"schema {report['schema']!r}, verdict {verdict!r}")
        return Statement(
            name=folder.name,
            dir=folder,
            made_s=statement.made_s,
            digest=str(report["digest"]),
            card=str(report["card"]),
            verdict=cast(VerdictName, verdict),
            findings=tuple(_finding(finding) for finding in findings),
        )
    except (CorruptError, KeyError, TypeError, OSError) as error:
        fault = f"{REPORT} cannot be used: {error}"
        return Statement(name=folder.name, dir=folder, made_s=statement.made_s, fault=fault)


def _finding(value: Mapping[str, Any]) -> Finding:
    kind = value["kind"]
    if kind not in _FINDING_KINDS:
        raise CorruptError(f"finding of kind {kind!r}")
    return Finding(kind=kind, message=str(value["message"]))


def report_digest(data: bytes) -> str:
    """The package that a report speaks of.

    Raises:
        CorruptError: It names none.
    """
    digest = parse_object(data, REPORT).get("digest")
    if not isinstance(digest, str):
        raise CorruptError(f"{REPORT} has digest {digest!r}, wanted that of a package")
    return digest


def parse_pointer(data: bytes, name: str, variant: str, file: str, origin: str) -> Pointer:
    """Read one channel file.

    Args:
        data: Its content.
        name: The recipe below which it lies.
        variant: The same.
        file: Its name.
        origin: Where it is, for messages.

    Raises:
        CorruptError: It is not one, or lies under another name than it says.
    """
    if len(data) > _MAX_POINTER_BYTES:
        raise CorruptError(f"{origin} is longer than a channel; remove it")
    value = parse_object(data, origin)
    try:
        reference = Reference(
            name=check_part("name", value["name"]),
            variant=check_part("variant", value["variant"]),
            version=check_part("version", value["version"]),
            digest=check_digest(value["digest"]),
        )
        pointer = Pointer(
            channel=check_part("channel", value["channel"]),
            card=check_part("card", value["card"]),
            reference=reference,
            seq=value["seq"],
        )
        whole = value["schema"] == 1 and type(pointer.seq) is int and pointer.seq > 0
    except (KeyError, TypeError, AttributeError, RecipeError) as error:
        raise CorruptError(f"{origin} is not a channel: {error}; remove it") from error
    if not whole or (name, variant, file) != (reference.name, reference.variant, pointer.file):
        raise CorruptError(f"{origin} is not the channel that its path says; remove it")
    return pointer


def _read_object(path: Path, limit_bytes: int) -> dict[str, Any]:
    return parse_object(read_bounded(path, limit_bytes), str(path))


def parse_object(data: bytes, origin: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CorruptError: It is none.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{origin} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CorruptError(f"{origin} is not a JSON object")
    return value
