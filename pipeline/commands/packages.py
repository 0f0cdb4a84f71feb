"""Commands that look at packages: list, show, generate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.commands.answer import Answer, answering
from pipeline.commands.arguments import ARTIFACTS, Policy, Reference, Registry, open_registry

if TYPE_CHECKING:
    from rich.table import Table

    from pipeline.registry.listing import Entry
    from pipeline.registry.resolve import Resolved, Terms
    from pipeline.registry.store import WritableStore

_STYLES = {
    "accepted": "green",
    "checked": "green",
    "compiled": "cyan",
    "damaged": "bold red",
    "untrusted": "bold red",
    "yanked": "bold red",
}


@answering
def list_packages(registry: Registry = ARTIFACTS, policy: Policy = None) -> Answer:
    """List the published packages, with what trusted keys state about them."""
    from pipeline.commands.tables import make_table, printable
    from pipeline.registry.listing import entries

    store, terms = _open(registry, policy)
    found = entries(store, terms)
    table = make_table(("reference", "size", "state", "channels"))
    table.columns[1].justify = "right"
    for entry in found:
        state, size = _state(entry), _size(entry.resolved) if entry.resolved else "?"
        table.add_row(
            printable(str(entry.place)),
            size,
            printable(state, _STYLES.get(state.split()[0], "yellow")),
            printable(_channels(entry)),
        )
    nothing = f"{registry} has no packages; make one with: enginesmith build RECIPE"
    return Answer(
        value={"packages": [_summary(entry) for entry in found]},
        shown=[table if found else nothing],
    )


@answering
def show(reference: Reference, registry: Registry = ARTIFACTS, policy: Policy = None) -> Answer:
    """Show one package: what it is for, where it is proven, its digest, who signed it."""
    from rich.console import Group
    from rich.filesize import decimal

    from pipeline.commands.tables import printable
    from pipeline.registry.listing import entry

    store, terms = _open(registry, policy)
    found = entry(store, reference, terms)
    assert found.resolved is not None  # an error says why not
    manifest, title = found.resolved.package.manifest, printable(str(found.place), "bold")
    parts = (
        title,
        _pairs_table(_facts(found, found.resolved)),
        _rows_table(
            ("file", "size", "sha256"),
            ((file["path"], decimal(file["size"]), file["sha256"]) for file in manifest["files"]),
        ),
        _rows_table(
            ("card", "verdict", "runtime", "signed by", "at", "statement"),
            (
                (one.card, one.verdict, " ".join(one.runtime), str(one.signer), one.signed_at[:19],
                 one.statement)
                for one in found.resolved.verification.verdicts
            ),
        ),
    )  # fmt: skip
    return Answer(value={**_summary(found), "manifest": manifest}, shown=[Group(*parts)])


@answering
def generate(
    target: Annotated[
        str,
        typer.Argument(
            metavar="REF|DIR", help="A package, or a pulled folder.", show_default=False
        ),
    ],
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="What to ask.", show_default=False)
    ],
    max_tokens: Annotated[int, typer.Option(min=1, help="End the answer after this many.")] = 256,
    registry: Annotated[
        str | None, typer.Option(metavar="URL", help=f"By default {ARTIFACTS}.")
    ] = None,
    policy: Policy = None,
    allow_unsigned: Annotated[
        bool, typer.Option("--allow-unsigned", help="Take a package without a signature.")
    ] = False,
    as_json: bool = False,
) -> Answer:
    """Stream a chat answer from a package, verified first."""
    from pipeline.commands.generating import stream
    from pipeline.registry.client.pull import PullRequest, open_target

    request = PullRequest(
        reference=target, registry=registry, policy=policy, allow_unsigned=allow_unsigned
    )
    _, package, _ = open_target(request)
    text = ""
    for piece in stream(package, prompt, max_tokens):
        text += piece
        if not as_json:
            print(piece, end="", flush=True)
    return Answer(value={"reference": target, "prompt": prompt, "text": text}, shown=[""])


def _open(registry: str, policy: Path | None) -> tuple[WritableStore, Terms]:
    """A store, and whose statements count for what it shows."""
    from pipeline.registry.resolve import Terms

    store, trust = open_registry(registry, policy)
    return store, Terms(policy=trust, allow_unsigned=True)


def _summary(entry: Entry) -> dict[str, Any]:
    """One published version for programs."""
    found = entry.resolved
    verdicts = found.verification.verdicts if found else ()
    signer = found.verification.signer if found else None
    return {
        "reference": str(entry.place),
        "digest": found.package.digest if found else None,
        "size_bytes": _size_bytes(found) if found else None,
        "state": _state(entry),
        "signer": signer.to_json() if signer else None,
        "proven_cards": list(found.verification.proven_cards) if found else [],
        "verdicts": [
            {"card": one.card, "verdict": one.verdict, "statement": one.statement}
            for one in verdicts
        ],
        "channels": [{"channel": one.channel, "card": one.card} for one in entry.pointers],
        "fault": entry.fault or None,
        "yanked": str(found.yank) if found and found.yank else None,
    }


def _state(entry: Entry) -> str:
    """One word, and the card that it holds for."""
    found = entry.resolved
    if found is None:
        return "damaged" if entry.corrupt else "untrusted"
    if found.yank:
        return "yanked"
    if found.verification.signer is None:
        return "unsigned"
    cards = dict.fromkeys(one.card for one in found.verification.verdicts)
    states = [one for card in cards if (one := found.verification.standing(card))]
    return ", ".join(f"{one.verdict} ({one.card})" for one in states) or "no test result"


def _facts(entry: Entry, found: Resolved) -> dict[str, str]:
    manifest, verification = found.package.manifest, found.verification
    source = manifest["source"]
    commit = f" at {source['commit']}" if source["commit"] else ""
    note = f" ({source['note']})" if source["note"] else ""
    proven = ", ".join(verification.proven_cards)
    signer = f"signed by {verification.signer}" if verification.signer else "no trusted signature"
    return {
        "digest": f"sha256:{found.package.digest}",
        "state": _state(entry),
        "proven on": proven
        or "no card: checked at most, never run on a card with a trusted result",
        **({"yanked": str(found.yank)} if found.yank else {}),
        "channels": _channels(entry) or "none",
        "signature": signer,
        "builder": verification.builder_id or "no trusted provenance",
        "format": f"{manifest['format']}, {manifest['quantization']}",
        "size": _size(found),
        "fits": _fits(manifest["match"]),
        "limits": _joined(manifest["limits"]),
        "serve": " ".join(manifest["serve"]["args"]) or "no server arguments",
        "source": f"{source['origin']}{commit}{note}",
        "licence": manifest["licence"]["spdx"],
        "build key": manifest["build_key"],
        "tools": _joined(manifest["build"]["tools"]),
        "ignored": "; ".join(verification.ignored) or "nothing",
    }


def _fits(match: Mapping[str, Any]) -> str:
    """Where it runs, in words."""
    where = ", ".join(match["cards"]) or ", ".join(f"sm_{sm}" for sm in match["sm"]) or "any GPU"
    runtime = match["runtime"]
    needs = [f"{match['min_vram_bytes'] / 2**30:.2f} GiB free"]
    needs += [f"{runtime['name']} {runtime['version']}"]
    needs += [f"CUDA {match['cuda']}"] if match["cuda"] else []
    needs += [f"driver >= {match['driver_min']}"] if match["driver_min"] else []
    return f"{where}; {', '.join(needs)}"


def _pairs_table(pairs: Mapping[str, str]) -> Table:
    from pipeline.commands.tables import make_table, printable

    table = make_table(("", ""))
    table.show_header = False
    for name, value in pairs.items():
        table.add_row(printable(name, "dim"), printable(value))
    return table


def _rows_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    from pipeline.commands.tables import make_table, printable

    table = make_table(columns)
    for row in rows:
        table.add_row(*map(printable, row))
    return table


def _channels(entry: Entry) -> str:
    return ", ".join(f"{one.channel} ({one.card})" for one in entry.pointers)


def _joined(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _size_bytes(found: Resolved) -> int:
    return sum(file["size"] for file in found.package.manifest["files"])


def _size(found: Resolved) -> str:
    from rich.filesize import decimal

    return decimal(_size_bytes(found))
