"""Tables of packages for people; `console.print(render_list(registry.entries()))`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.registry.backend import Entry
from pipeline.registry.statements import Pointer, Statement

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from pipeline.registry.signing.summary import Signatures

_STYLES = {
    "accepted": "green",
    "checked": "green",
    "compiled": "cyan",
    "damaged": "bold red",
    "yanked": "bold red",
}


def render_list(entries: Sequence[Entry]) -> Table:
    """One line per published version."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("reference", "size", "verdict", "channels", "made"):
        table.add_column(column, justify="right" if column == "size" else "left", overflow="fold")
    for entry in entries:
        standing = "yanked" if entry.yanked else entry.verdict or "no statement"
        verdict = "damaged" if entry.fault else standing
        table.add_row(
            _text(f"{entry.name}/{entry.variant}:{entry.version}"),
            _text(_size(entry.size_bytes) if entry.manifest else "?"),
            _text(verdict, _STYLES.get(verdict, "yellow")),
            _text(_channels(entry.channels)),
            _text(_time(entry.made_s)),
        )
    return table


def render_show(entry: Entry, signatures: Signatures) -> Group:
    """All that is known of one version: facts, signatures, files, statements, findings."""
    from rich.console import Group

    parts: list[Table | Text] = [_text(f"{entry.name}/{entry.variant}:{entry.version}", "bold")]
    if entry.manifest is None:
        parts.append(_text(f"damaged: {entry.fault}", _STYLES["damaged"]))
    else:
        manifest = entry.manifest
        facts = {
            "digest": f"sha256:{entry.digest}",
            "place": entry.where,
            "format": manifest["format"],
            "size": _size(entry.size_bytes),
            "fits": _fits(manifest["match"]),
            "limits": _pairs(manifest["limits"]),
            "serve": " ".join(manifest["serve"]["args"]) or "no server arguments",
            "source": _source(manifest["source"]),
            "licence": manifest["licence"]["spdx"],
            "build key": manifest["build_key"],
            "tools": _pairs(manifest["build"]["tools"]),
            "signature": str(signatures),
        }
        parts += [_facts(facts), _files(manifest["files"])]
    parts.append(
        _facts(
            {
                "verdict": entry.verdict or "no statement",
                **({"yanked": entry.yanked} if entry.yanked else {}),
                "channels": _channels(entry.channels) or "none",
                "made": _time(entry.made_s),
            }
        )
    )
    if entry.statements:
        parts.append(_statements(entry.statements, signatures.verdicts))
    return Group(*parts)


def _facts(facts: Mapping[str, str]) -> Table:
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(_text(name), _text(value))
    return table


def _files(files: Sequence[Mapping[str, Any]]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("file", overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("sha256", overflow="ellipsis", no_wrap=True)
    for file in files:
        table.add_row(_text(file["path"]), _text(_size(file["size"])), _text(file["sha256"]))
    return table


def _statements(statements: Sequence[Statement], signers: Mapping[str, str]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("statement", "verdict", "card", "signed by", "made", "findings"):
        table.add_column(column, overflow="fold")
    for found in statements:
        findings = [f"{finding.kind}: {finding.message}" for finding in found.findings]
        verdict = "damaged" if found.fault else found.verdict or ""
        table.add_row(
            _text(found.name),
            _text(verdict, _STYLES.get(verdict, "yellow")),
            _text(found.card),
            _text(signers.get(found.name, "nobody trusted") if found.verdict else ""),
            _text(_time(found.made_s)),
            _text("\n".join([found.fault] if found.fault else findings)),
        )
    return table


def _fits(match: Mapping[str, Any]) -> str:
    """Where it runs, in words."""
    where = ", ".join(match["cards"]) or ", ".join(f"sm_{sm}" for sm in match["sm"]) or "any GPU"
    runtime = match["runtime"]
    needs = [f"{match['min_vram_bytes'] / 2**30:.2f} GiB free", f"{runtime['name']} "]
    needs[-1] += runtime["version"]
    needs += [f"CUDA {match['cuda']}"] if match["cuda"] else []
    needs += [f"driver >= {match['driver_min']}"] if match["driver_min"] else []
    return f"{where}; {', '.join(needs)}"


def _source(source: Mapping[str, Any]) -> str:
    commit = f" at {source['commit']}" if source["commit"] else ""
    note = f" ({source['note']})" if source["note"] else ""
    return f"{source['origin']}{commit}{note}"


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _channels(pointers: Sequence[Pointer]) -> str:
    return ", ".join(f"{pointer.channel} ({pointer.card})" for pointer in pointers)


def _time(unix_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(unix_s)) if unix_s else ""


def _size(size_bytes: int) -> str:
    """Decimal units, three significant digits."""
    if size_bytes < 1000:
        return f"{size_bytes} B"
    size, units = float(size_bytes), iter(("kB", "MB", "GB", "TB"))
    unit = "B"
    while size >= 999.5 and (following := next(units, None)):
        size, unit = size / 1000, following
    return f"{size:.3g} {unit}"


def _text(text: str, style: str = "") -> Text:
    """Text from a package, which could hold markup or terminal escapes: shown, never obeyed."""
    from rich.text import Text

    shown = "".join(
        c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text
    )
    return Text(shown, style=style)
