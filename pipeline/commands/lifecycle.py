"""Commands that move channels and remove versions: promote, rollback, yank, gc, channels."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.commands.answer import Answer, answering
from pipeline.commands.arguments import ARTIFACTS, Policy, Reference, Registry, open_registry

if TYPE_CHECKING:
    from pipeline.registry.gc import Collected
    from pipeline.registry.promotion import Moved
    from pipeline.registry.store import WritableStore
    from pipeline.registry.trust.channels import Move
    from pipeline.registry.trust.policy import TrustPolicy
    from pipeline.registry.trust.statements import Author

_Channel = Annotated[str, typer.Option(metavar="NAME", help="stable, candidate, or your own.")]
_Card = Annotated[
    str | None,
    typer.Option(
        metavar="CARD",
        help="As NVML calls it, spaces as dashes; by default the only one there is.",
        show_default=False,
    ),
]
_Reason = Annotated[str, typer.Option(metavar="TEXT", help="Recorded, for people.")]
_Name = Annotated[str, typer.Argument(metavar="NAME[/VARIANT]", show_default=False)]


@answering
def promote(
    reference: Reference,
    channel: _Channel = "stable",
    card: _Card = None,
    reason: _Reason = "",
    registry: Registry = ARTIFACTS,
    policy: Policy = None,
) -> Answer:
    """Move a channel to a package whose trusted test result is good enough for it."""
    from pipeline.registry import promotion

    store, trust, author = _open_to_sign(registry, policy, reason)
    done = promotion.promote(
        store, reference, channel=channel, card=card, author=author, policy=trust
    )
    return _moved(done)


@answering
def rollback(
    name: _Name,
    channel: _Channel = "stable",
    card: _Card = None,
    reason: _Reason = "",
    registry: Registry = ARTIFACTS,
    policy: Policy = None,
) -> Answer:
    """Move a channel back to the package before; promote goes further back."""
    from pipeline.registry import promotion

    store, trust, author = _open_to_sign(registry, policy, reason)
    done = promotion.rollback(store, name, channel=channel, card=card, author=author, policy=trust)
    return _moved(done)


@answering
def yank(
    reference: Reference,
    reason: _Reason = "",
    undo: Annotated[bool, typer.Option("--undo", help="Make it usable again.")] = False,
    registry: Registry = ARTIFACTS,
    policy: Policy = None,
) -> Answer:
    """Stop a package from being pulled, but by its digest and with --allow-yanked."""
    from pipeline.registry.promotion import channels_of, yank_package

    store, trust, author = _open_to_sign(registry, policy, reason)
    found, changed = yank_package(store, reference, author, trust, undo=undo)
    what = f"{found.reference.name}/{found.reference.variant}"
    pointing = [
        channel
        for _, _, channel in channels_of(store, trust, what)
        if channel.newest.reference == found.reference and not undo
    ]
    state = f"yanked {found.yank}" if found.yank else "not yanked any more"
    lines = [
        f"{found.place} is {state}{'' if changed else ', as it was'}",
        f"digest  sha256:{found.package.digest}",
    ]
    lines += [
        f"warning {one.name} of {one.card} points to it, so pulls of that channel fail now; "
        f"enginesmith rollback {what} --channel {one.name} --card {one.card} --registry {registry}"
        for one in pointing
    ]
    value = {
        "reference": str(found.reference),
        "digest": found.package.digest,
        "yanked": found.yank is not None,
        "changed": changed,
        "actor": author.actor,
        "reason": author.reason,
        "channels": [{"channel": one.name, "card": one.card} for one in pointing],
    }
    return Answer(value=value, shown=lines)


@answering
def gc(
    delete: Annotated[
        bool, typer.Option("--delete", help="Remove; without it this only shows.")
    ] = False,
    keep_days: Annotated[
        float, typer.Option(min=0, help="Keep what was signed, tested or yanked since.")
    ] = 30.0,
    history: Annotated[
        int, typer.Option(min=1, help="Packages of each channel to keep: 2 is this and the last.")
    ] = 2,
    keep: Annotated[
        list[str] | None, typer.Option(metavar="REF", help="Keep this one, too; repeatable.")
    ] = None,
    damaged: Annotated[
        bool, typer.Option("--damaged", help="Damaged versions may go like others.")
    ] = False,
    registry: Registry = ARTIFACTS,
    policy: Policy = None,
) -> Answer:
    """Show which versions nothing needs any more, and remove them with --delete."""
    from pipeline.registry.gc import Rules, collect
    from pipeline.registry.resolve import Terms, resolve
    from pipeline.registry.store import Place

    store, trust = open_registry(registry, policy)
    terms = Terms(policy=trust, allow_unsigned=True, allow_yanked=True)
    pins = frozenset(Place.of(resolve(store, text, terms).reference) for text in keep or ())
    rules = Rules(keep_days=keep_days, history=history, pins=pins, damaged=damaged)
    done = collect(store, trust, rules, delete=delete)
    return _collected(done, delete=delete)


@answering
def channels(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME[/VARIANT]", help="By default all.", show_default=False),
    ] = None,
    history: Annotated[bool, typer.Option("--history", help="All moves, newest first.")] = False,
    registry: Registry = ARTIFACTS,
    policy: Policy = None,
) -> Answer:
    """Show where the channels point, by their signed moves."""
    from pipeline.commands.tables import make_table, printable
    from pipeline.registry.promotion import channels_of

    store, trust = open_registry(registry, policy)
    found = channels_of(store, trust, name)
    table = make_table(("channel", "card", "package", "by", "at", "why"))
    for _, _, channel in found:
        for move in reversed(channel.moves if history else channel.moves[-1:]):
            by = f"{move.actor} ({move.signer.name})"
            row = (channel.name, channel.card, str(move.reference), by, move.signed_at[:19])
            table.add_row(*map(printable, (*row, move.reason)))
    nothing = f"{store.url} has no channels{f' of {name}' if name else ''}"
    value = {
        "channels": [
            {
                "name": name,
                "variant": variant,
                "channel": channel.name,
                "card": channel.card,
                "moves": [_move_json(move) for move in channel.moves],
            }
            for name, variant, channel in found
        ]
    }
    return Answer(value=value, shown=[table if found else nothing])


def _open_to_sign(
    registry: str, policy: Path | None, reason: str
) -> tuple[WritableStore, TrustPolicy, Author]:
    from pipeline.registry.trust.keys import require_signing_key
    from pipeline.registry.trust.statements import Author, actor_of

    store, trust = open_registry(registry, policy)
    key = require_signing_key(os.environ, local=store.local)
    return store, trust, Author(key=key, actor=actor_of(os.environ), reason=reason)


def _collected(done: Collected, *, delete: bool) -> Answer:
    from rich.filesize import decimal

    from pipeline.commands.tables import make_table, printable

    table = make_table(("", "package", "size", "why"))
    for fate in sorted(done.fates, key=lambda one: (not one.remove, one.place)):
        what = printable("remove", "yellow") if fate.remove else printable("keep")
        size = "?" if fate.size_bytes is None else decimal(fate.size_bytes)
        table.add_row(what, *map(printable, (str(fate.place), size, fate.why)))
    go = [fate.size_bytes or 0 for fate in done.fates if fate.remove]
    lines = [
        f"removed {len(done.removed)} versions; a later gc frees their {done.freed_bytes} bytes"
        if delete
        else f"{len(go)} versions of {sum(go)} bytes would go; nothing was removed, "
        "--delete removes"
    ]
    lines += [f"{'removed' if delete else 'left over'}: {words}" for words in done.leftovers]
    value = {
        "deleted": delete,
        "versions": [
            {
                "reference": str(fate.place),
                "remove": fate.remove,
                "why": fate.why,
                "size_bytes": fate.size_bytes,
            }
            for fate in done.fates
        ],
        "removed": [str(place) for place in done.removed],
        "freed_bytes": done.freed_bytes,
        "leftovers": list(done.leftovers),
    }
    return Answer(value=value, shown=[*([table] if done.fates else []), *lines])


def _moved(done: Moved) -> Answer:
    move = done.move
    was = f"it was {done.before}" if done.before else "it was nowhere"
    lines = [
        f"{move.channel} of {move.card} is {move.reference} "
        f"({was if done.changed else 'it was so already'})",
        f"digest  sha256:{move.reference.digest}",
        f"because {done.verdict.verdict} on {done.verdict.card}, signed by {done.verdict.signer}",
    ]
    value = {
        **_move_json(move),
        "changed": done.changed,
        "before": str(done.before) if done.before else None,
        "verdict": done.verdict.verdict,
    }
    return Answer(value=value, shown=lines)


def _move_json(move: Move) -> dict[str, Any]:
    """A move, for programs."""
    return {
        "reference": str(move.reference),
        "digest": move.reference.digest,
        "channel": move.channel,
        "card": move.card,
        "actor": move.actor,
        "reason": move.reason,
        "signed_at": move.signed_at,
        "signer": move.signer.name,
    }
