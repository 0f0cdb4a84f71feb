"""Commands that look at packages and bring them elsewhere: list, show, generate, copy."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.answer import Answer, answering, make_table, printable, screen_logging
from pipeline.commands.arguments import (
    ARTIFACTS,
    Policy,
    Reference,
    Registry,
    Target,
    TargetRegistry,
    Unsigned,
    open_registry,
)
from pipeline.core.errors import escaped

if TYPE_CHECKING:
    from pipeline.registry.inventory import Entry
    from pipeline.registry.stores.publication import WritableStore
    from pipeline.registry.trust.verification import Resolved, Terms

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
    """List the packages, with what trusted keys say of them."""
    from rich.filesize import decimal

    from pipeline.registry.inventory import entries

    found = entries(*_open(registry, policy))
    rows = []
    for entry in found:
        state, size_bytes = _state(entry), _size_bytes(entry)
        size = "?" if size_bytes is None else decimal(size_bytes)
        styled = printable(state, _STYLES.get(state.split()[0], "yellow"))
        rows.append((str(entry.place), size, styled, _channels(entry)))
    table = make_table(("reference", "size", "state", "channels"), rows)
    table.columns[1].justify = "right"
    nothing = f"{registry} has no packages; make one with: enginesmith build RECIPE"
    value = {"packages": [_summary(entry) for entry in found]}
    return Answer(value=value, shown=[table if found else nothing])


@answering
def show(reference: Reference, registry: Registry = ARTIFACTS, policy: Policy = None) -> Answer:
    """Show one package: its use, proofs, files and signers."""
    from rich.filesize import decimal

    from pipeline.registry.inventory import entry

    store, terms = _open(registry, policy)
    found = entry(store, reference, terms)
    assert found.resolved is not None  # an error says why not
    manifest = found.resolved.package.manifest
    facts = _facts(found, found.resolved).items()
    parts = (
        printable(str(found.place), "bold"),
        make_table(("", ""), ((printable(name, "dim"), value) for name, value in facts)),
        make_table(
            ("file", "size", "sha256"),
            ((file["path"], decimal(file["size"]), file["sha256"]) for file in manifest["files"]),
        ),
        make_table(
            ("card", "verdict", "runtime", "signed by", "at", "statement"),
            (
                (one.card, one.verdict, " ".join(one.runtime), str(one.signer), one.signed_at[:19],
                 one.statement)
                for one in found.resolved.verdicts
            ),
        ),
    )  # fmt: skip
    return Answer(value={**_summary(found), "manifest": manifest}, shown=parts)


@answering
def generate(
    target: Target,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", show_default=False)],
    max_tokens: Annotated[int, typer.Option(min=1, help="End the answer after this many.")] = 256,
    registry: TargetRegistry = None,
    policy: Policy = None,
    allow_unsigned: Unsigned = False,
    as_json: bool = False,
) -> Answer:
    """Stream a chat answer from a package, verified first."""
    from pipeline.commands.generating import stream
    from pipeline.registry.client.pull import PullRequest
    from pipeline.registry.client.verify import open_target

    request = PullRequest(
        reference=target, registry=registry, policy=policy, allow_unsigned=allow_unsigned
    )
    _, package, _ = open_target(request, to_load=True)
    text = ""
    for piece in stream(package, prompt, max_tokens):
        text += piece
        if not as_json:
            print(escaped(piece), end="", flush=True)
    return Answer(value={"reference": target, "prompt": prompt, "text": text}, shown=[""])


@answering
def copy(
    reference: Reference,
    source: Annotated[
        str, typer.Option("--from", metavar="URL", help="Where it is.", show_default=False)
    ],
    target: Annotated[
        str, typer.Option("--to", metavar="URL", help="Where it goes.", show_default=False)
    ],
    policy: Policy = None,
    allow_unsigned: Unsigned = False,
) -> Answer:
    """Copy a package to another registry, byte for byte.

    Its signatures and test results go with it.
    """
    from pipeline.registry.promotion import copy as copy_package

    with screen_logging():
        done = copy_package(
            reference, source, target, os.environ, policy=policy, allow_unsigned=allow_unsigned
        )
    found, signer = done.resolved, done.resolved.signer
    return Answer(
        value={
            "reference": str(found.reference),
            "digest": found.package.digest,
            "from": source,
            "to": target,
            "new": done.new,
            "statements_added": done.added,
            "signer": signer.name if signer else None,
            "allow_unsigned": allow_unsigned,
        },
        shown=[
            f"{'Copied' if done.new else 'Already there'}: {found.place}, "
            f"{f'signed by {signer}' if signer else 'UNSIGNED'}",
            f"digest      sha256:{found.package.digest}",
            f"from        {source}",
            f"to          {target}",
            f"statements  {done.added} new there; no channel was moved",
        ],
    )


def _open(registry: str, policy: Path | None) -> tuple[WritableStore, Terms]:
    """A store, and whose statements count for what it shows."""
    from pipeline.registry.trust.verification import Terms

    store, trust = open_registry(registry, policy)
    return store, Terms(policy=trust, allow_unsigned=True)


def _summary(entry: Entry) -> dict[str, Any]:
    """One published version for programs."""
    found = entry.resolved
    signer = found.signer if found else None
    return {
        "reference": str(entry.place),
        "digest": found.package.digest if found else None,
        "size_bytes": _size_bytes(entry),
        "state": _state(entry),
        "signer": signer.to_json() if signer else None,
        "proven_cards": list(found.proven_cards) if found else [],
        "verdicts": [
            {"card": one.card, "verdict": one.verdict, "statement": one.statement}
            for one in (found.verdicts if found else ())
        ],
        "channels": [{"channel": one.name, "card": one.card} for one in entry.channels],
        "fault": entry.fault or None,
        "yanked": found.yank if found else None,
    }


def _state(entry: Entry) -> str:
    """One word, and the card that it holds for."""
    found = entry.resolved
    if found is None:
        return "damaged" if entry.corrupt else "untrusted"
    if found.yank:
        return "yanked"
    if found.signer is None:
        return "unsigned"
    cards = dict.fromkeys(one.card for one in found.verdicts)
    states = [one for card in cards if (one := found.standing(card))]
    return ", ".join(f"{one.verdict} ({one.card})" for one in states) or "no test result"


def _facts(entry: Entry, found: Resolved) -> dict[str, str]:
    from rich.filesize import decimal

    manifest = found.package.manifest
    source, match = manifest["source"], manifest["match"]
    commit = f" at {source['commit']}" if source["commit"] else ""
    note = f" ({source['note']})" if source["note"] else ""
    proven = ", ".join(found.proven_cards)
    signer = f"signed by {found.signer}" if found.signer else "no trusted signature"
    fits = ", ".join(match["cards"]) or ", ".join(f"sm_{sm}" for sm in match["sm"]) or "any GPU"
    needs = [f"{match['min_vram_bytes'] / 2**30:.2f} GiB free"]
    needs += [" ".join((match["runtime"]["name"], match["runtime"]["version"]))]
    needs += [f"CUDA {match['cuda']}"] if match["cuda"] else []
    needs += [f"driver >= {match['driver_min']}"] if match["driver_min"] else []
    return {
        "digest": f"sha256:{found.package.digest}",
        "state": _state(entry),
        "proven on": proven or "no card: never run on one with a trusted result",
        **({"yanked": found.yank} if found.yank else {}),
        "channels": _channels(entry) or "none",
        "signature": signer,
        "builder": found.builder_id or "no trusted provenance",
        "format": f"{manifest['format']}, {manifest['quantization']}",
        "size": decimal(found.package.size_bytes),
        "fits": f"{fits}; {', '.join(needs)}",
        "limits": _join(manifest["limits"]),
        "serve": " ".join(manifest["serve"]["args"]) or "no server arguments",
        "source": f"{source['origin']}{commit}{note}",
        "licence": manifest["licence"]["spdx"],
        "build key": manifest["build_key"],
        "tools": _join(manifest["build"]["tools"]),
        "ignored": "; ".join(found.ignored) or "nothing",
    }


def _channels(entry: Entry) -> str:
    return ", ".join(f"{one.name} ({one.card})" for one in entry.channels)


def _join(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _size_bytes(entry: Entry) -> int | None:
    return entry.resolved.package.size_bytes if entry.resolved else None
