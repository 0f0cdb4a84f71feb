"""What `enginesmith promote`, `rollback`, `yank`, `gc` and `channels` do, less the command line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.commands.answer import Answer
from pipeline.core.errors import ExitCode, Fault, RecipeError
from pipeline.core.values import Reference
from pipeline.registry.lifecycle import gc
from pipeline.registry.lifecycle.channels import Log, read_logs, stale_pointers
from pipeline.registry.lifecycle.lookup import find, variants_of
from pipeline.registry.lifecycle.promote import Moved
from pipeline.registry.lifecycle.records import Author, Move, actor_of
from pipeline.registry.lifecycle.yank import yank_package
from pipeline.registry.reference import parse_reference
from pipeline.registry.signing.keys import KEY_PATH, choose_key, load_key
from pipeline.registry.signing.machine import machine_trust
from pipeline.registry.signing.trust import TrustPolicy
from pipeline.registry.stores.opening import open_store
from pipeline.registry.stores.store import Place, WritableStore


@dataclass(frozen=True, kw_only=True)
class Desk:
    """Where a command works, and whom it believes.

    Attributes:
        store: Of `--registry`.
        policy: Of `--policy`, or of this machine.
        environ: Names the key.
    """

    store: WritableStore
    policy: TrustPolicy
    environ: Mapping[str, str]

    def author(self, reason: str) -> Author:
        """Who acts here.

        Raises:
            RecipeError: There is no key to sign with, or none that could count there.
        """
        choice = choose_key(self.environ)
        if choice.kind == "local" and not self.store.local:
            fault = (
                f"no key is given to sign with, and this machine's local key does not count for "
                f"{self.store.url}; set this variable to the path of a private key"
            )
            raise RecipeError([Fault(KEY_PATH, fault)])
        key = load_key(choice, self.environ, make=False)
        return Author(key=key, actor=actor_of(self.environ), reason=reason)


def open_desk(registry: str, policy: Path | None, environ: Mapping[str, str]) -> Desk:
    """Open a registry.

    Args:
        registry: URL, as in `open_store`.
        policy: From the command line; None for the machine's own.
        environ: The environment.

    Raises:
        RecipeError: No such kind of registry, or the policy cannot be read.
    """
    store = open_store(registry)
    trust = machine_trust(environ, own_folder=store.local, policy=policy)
    return Desk(store=store, policy=trust, environ=environ)


def moved(done: Moved) -> Answer:
    """What `promote` and `rollback` answer."""
    move = done.move
    was = f"it was {done.before}" if done.before else "it was nowhere"
    lines = [
        f"{move.channel} of {move.card} is {move.reference} (move {move.seq}; "
        f"{was if done.changed else 'it was so already'})",
        f"digest  sha256:{move.reference.digest}",
        f"because {done.verdict.verdict} on {done.verdict.card}, signed by "
        f"{done.verdict.signer.name}",
    ]
    value = {
        **move_json(move),
        "changed": done.changed,
        "before": str(done.before) if done.before else None,
        "verdict": done.verdict.verdict,
    }
    return Answer(value=value, shown=lines)


def run_yank(desk: Desk, text: str, *, reason: str, undo: bool) -> Answer:
    """As `yank.yank_package`; names the channels that still point to the package."""
    reference = find(desk.store, desk.policy, text)
    yank, changed = yank_package(desk.store, reference, desk.author(reason), desk.policy, undo=undo)
    pointing = [] if undo else _pointing(desk, reference)
    what = "yanked" if yank.yanked else "not yanked any more"
    lines = [
        f"{reference} is {what}{'' if changed else ', as it was'} ({yank.actor}, {yank.at})",
        f"digest  sha256:{reference.digest}",
    ]
    lines += [
        f"warning {channel} of {card} points to it, so pulls of that channel fail now; "
        f"enginesmith rollback {reference.name}/{reference.variant} --channel {channel} "
        f"--card {card}"
        for channel, card in pointing
    ]
    value = {
        "reference": str(reference),
        "digest": reference.digest,
        "yanked": yank.yanked,
        "changed": changed,
        "seq": yank.seq,
        "actor": yank.actor,
        "reason": yank.reason,
        "at": yank.at,
        "channels": [{"channel": channel, "card": card} for channel, card in pointing],
    }
    return Answer(value=value, shown=lines)


def _pointing(desk: Desk, reference: Reference) -> list[tuple[str, str]]:
    """Channels that point to a package, as far as their logs can be believed."""
    logs = read_logs(desk.store, desk.policy, reference.name, reference.variant)
    return [
        (held.channel, held.card)
        for held in logs
        if held.moves and held.moves[-1].reference == reference
    ]


def run_gc(
    desk: Desk,
    *,
    delete: bool,
    keep_days: float,
    history: int,
    keep: Sequence[str],
    damaged: bool,
) -> Answer:
    """As `gc.collect`; exits as untrusted if a channel log cannot be believed."""
    from pipeline.registry.lifecycle.render import render_fates

    pins = frozenset(Place.of(find(desk.store, desk.policy, text)) for text in keep)
    rules = gc.Rules(keep_days=keep_days, history=history, pins=pins, damaged=damaged)
    done = gc.collect(desk.store, desk.policy, rules, delete=delete)
    go = [fate for fate in done.fates if fate.remove]
    size_bytes = sum(fate.size_bytes or 0 for fate in go)
    if delete:
        lines = [f"removed {len(done.removed)} versions, {done.freed_bytes} bytes"]
    else:
        lines = [
            f"{len(go)} versions of {size_bytes} bytes would go; nothing was removed, "
            "--delete removes"
        ]
    lines += [f"{'removed' if delete else 'left over'}: {words}" for words in done.leftovers]
    if desk.store.url.startswith("oci://"):
        lines.append(
            "an OCI registry frees the bytes itself, when its own garbage collection runs; the "
            "counts are those of the packages"
        )
    lines += [f"warning: {fault}" for fault in done.faults]
    value = {
        "deleted": delete,
        "versions": [_fate_json(fate) for fate in done.fates],
        "removed": [str(place) for place in done.removed],
        "freed_bytes": done.freed_bytes,
        "leftovers": list(done.leftovers),
    }
    return Answer(
        value=value,
        shown=[*([render_fates(done.fates)] if done.fates else []), *lines],
        exit_code=ExitCode.UNTRUSTED if done.faults else ExitCode.OK,
        message="\n".join(done.faults),
        faults=[Fault("", fault) for fault in done.faults],
    )


def _fate_json(fate: gc.Fate) -> dict[str, Any]:
    return {
        "reference": str(fate.place),
        "remove": fate.remove,
        "why": fate.why,
        "size_bytes": fate.size_bytes,
        "age_s": None if fate.age_s is None else round(fate.age_s),
        "damage": fate.damage or None,
    }


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One channel, for people.

    Attributes:
        where: `NAME/VARIANT`.
        log: Its moves, or why they cannot be believed; None if there are none.
        channel: Such as `stable`.
        card: Whose.
        note: What is odd about it; empty if nothing is.
    """

    where: str
    channel: str
    card: str
    log: Log | None
    note: str


def run_channels(desk: Desk, text: str | None, *, history: bool) -> Answer:
    """Where the channels point, and their moves; exits as untrusted if one cannot be believed.

    Args:
        desk: Where.
        text: `NAME` or `NAME/VARIANT`; None for all.
        history: Show people all moves, not only the newest.
    """
    from pipeline.registry.lifecycle.render import render_channels

    shown = [
        one for name, variant in _asked(desk, text) for one in _channels_of(desk, name, variant)
    ]
    faults = [
        Fault(f"{one.where} {one.channel} {one.card}", str(one.log.fault))
        for one in shown
        if one.log is not None and one.log.fault is not None
    ]
    nothing = f"{desk.store.url} has no channels{f' of {text}' if text else ''}"
    table = [render_channels(shown, history=history)] if shown else [nothing]
    notes = [f"{one.channel} of {one.card}: {one.note}" for one in shown if one.note]
    value = {
        "channels": [
            {
                "name": one.where.partition("/")[0],
                "variant": one.where.partition("/")[2],
                "channel": one.channel,
                "card": one.card,
                "moves": [move_json(move) for move in one.log.moves] if one.log else [],
                "note": one.note or None,
            }
            for one in shown
        ]
    }
    return Answer(
        value=value,
        shown=[*table, *notes],
        exit_code=ExitCode.UNTRUSTED if faults else ExitCode.OK,
        message="\n".join(str(fault) for fault in faults),
        faults=faults,
    )


def _asked(desk: Desk, text: str | None) -> Iterator[tuple[str, str]]:
    if text is None:
        for name in desk.store.names():
            for variant in desk.store.variants(name):
                yield name, variant
        return
    if ":" in text or "@" in text:
        raise RecipeError([Fault("", f"{text} names a package; write NAME or NAME/VARIANT")])
    wanted = parse_reference(text)
    for variant in variants_of(desk.store, wanted):
        if wanted.variant in {None, variant}:
            yield wanted.name, variant


def _channels_of(desk: Desk, name: str, variant: str) -> Iterator[Shown]:
    logs = read_logs(desk.store, desk.policy, name, variant)
    newest = [held.moves[-1] for held in logs if held.moves]
    stale = set(stale_pointers(desk.store, newest))
    where = f"{name}/{variant}"
    for held in logs:
        file = f"{held.channel}.{held.card}.json"
        note = f"{file} shows something else; the next move repairs it" if file in stale else ""
        yield Shown(
            where=where,
            channel=held.channel,
            card=held.card,
            log=held,
            note=str(held.fault) if held.fault else note,
        )
    logged = {f"{held.channel}.{held.card}.json" for held in logs}
    for file, data in sorted(desk.store.channels(name, variant).items()):
        channel, _, card = file.removesuffix(".json").partition(".")
        if file not in logged and (version := gc.pointed_to(data)):
            note = f"an unsigned pointer to {version}, which no reader believes"
            yield Shown(where=where, channel=channel, card=card, log=None, note=note)


def move_json(move: Move) -> dict[str, Any]:
    """A move, for programs."""
    return {
        "reference": str(move.reference),
        "digest": move.reference.digest,
        "channel": move.channel,
        "card": move.card,
        "seq": move.seq,
        "actor": move.actor,
        "reason": move.reason,
        "at": move.at,
        "signer": move.signer,
        "restart": move.restart,
    }
