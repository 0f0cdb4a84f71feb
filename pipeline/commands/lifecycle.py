"""Commands for those who sign: keygen, policy, sign, promote, rollback, yank; channels and gc."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.answer import Answer, answering, make_table, printable
from pipeline.commands.arguments import ARTIFACTS, Policy, Reference, Registry, open_registry

if TYPE_CHECKING:
    from pipeline.registry.inventory import Collected
    from pipeline.registry.promotion import Moved, Releaser

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
def keygen(
    out: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="By default signing.key in ~/.config/enginesmith."),
    ] = None,
) -> Answer:
    """Make a key pair to sign packages with."""
    from pipeline.registry.trust.policy import config_root
    from pipeline.registry.trust.private_key import KEY_PATH
    from pipeline.registry.trust.signing import generate_key, write_key_pair

    path = out if out is not None else config_root(os.environ) / "signing.key"
    key = generate_key()
    public, keyid = write_key_pair(key, path), key.public.keyid
    paths = {"private_key": str(path.absolute()), "public_key": str(public.absolute())}
    lines = [
        f"private key {path} (mode 0600; sign with {KEY_PATH}={path})",
        f"public key  {public} (for enginesmith policy)",
        f"key id      {keyid}",
    ]
    return Answer(value={**paths, "keyid": keyid}, shown=lines)


@answering
def policy(
    keys: Annotated[list[Path], typer.Argument(metavar="KEY.pub...", show_default=False)],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Replaces nothing.")] = Path(
        "policy.yaml"
    ),
) -> Answer:
    """Write a trust policy that gives every right to these keys."""
    from pipeline.core.errors import ConflictError
    from pipeline.registry.disk import disk_errors, write_new
    from pipeline.registry.trust.policy import POLICY_PATH, read_public_key
    from pipeline.registry.trust.signing import policy_text

    named = {path.name.removesuffix(".pub").removesuffix(".key"): path for path in keys}
    text = policy_text({name: read_public_key(path) for name, path in named.items()})
    with disk_errors(f"write {out}"):
        try:
            write_new(out, text.encode())
        except FileExistsError:
            raise ConflictError(f"{out} exists; edit it, or choose another with --out") from None
    shown = [f"policy {out} trusts {', '.join(named)} (use it with {POLICY_PATH}={out})"]
    return Answer(value={"policy": str(out.absolute()), "keys": list(named)}, shown=shown)


@answering
def sign(
    reference: Reference,
    key: Annotated[Path, typer.Option(metavar="PATH", help="A private key of enginesmith keygen.")],
    registry: Registry = ARTIFACTS,
    policy: Policy = None,
) -> Answer:
    """Sign a package trusted here with another key.

    Its test results are signed, too.
    """
    from pipeline.registry.promotion import countersign
    from pipeline.registry.trust.private_key import read_private_key

    store, trust = open_registry(registry, policy)
    signing = read_private_key(key)
    found, keyid = countersign(store, reference, signing, trust), signing.public.keyid
    value = {"reference": str(found.reference), "digest": found.package.digest, "keyid": keyid}
    return Answer(value=value, shown=[f"{found.place} is signed by key {keyid[:12]}, too"])


@answering
def promote(
    reference: Reference,
    channel: _Channel = "stable",
    card: _Card = None,
    reason: _Reason = "",
    registry: Registry = ARTIFACTS,
    policy: Policy = None,
) -> Answer:
    """Move a channel to a package that passed its tests.

    A trusted test result must be good enough for the channel.
    """
    return _answer_move(_releaser(registry, policy, reason).promote(reference, channel, card))


@answering
def rollback(
    name: _Name,
    channel: _Channel = "stable",
    card: _Card = None,
    reason: _Reason = "",
    registry: Registry = ARTIFACTS,
    policy: Policy = None,
) -> Answer:
    """Move a channel back to the package before.

    To go further back: promote.
    """
    return _answer_move(_releaser(registry, policy, reason).rollback(name, channel, card))


@answering
def yank(
    reference: Reference,
    reason: _Reason = "",
    undo: Annotated[bool, typer.Option("--undo", help="Make it usable again.")] = False,
    registry: Registry = ARTIFACTS,
    policy: Policy = None,
) -> Answer:
    """Stop a package from being pulled.

    Who names its digest and --allow-yanked still gets it.
    """
    from pipeline.registry.promotion import channels_of

    releaser = _releaser(registry, policy, reason)
    found, changed = releaser.yank(reference, undo=undo)
    what = f"{found.reference.name}/{found.reference.variant}"
    pointing = [
        channel
        for _, _, channel in channels_of(releaser.store, releaser.policy, what)
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
        "actor": releaser.actor,
        "reason": reason,
        "channels": [{"channel": one.name, "card": one.card} for one in pointing],
    }
    return Answer(value=value, shown=lines)


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
    from pipeline.registry.promotion import channels_of

    store, trust = open_registry(registry, policy)
    found = channels_of(store, trust, name)
    rows = [
        (channel.name, channel.card, str(move.reference), f"{move.actor} ({move.signer.name})",
         move.signed_at[:19], move.reason)
        for _, _, channel in found
        for move in reversed(channel.moves if history else channel.moves[-1:])
    ]  # fmt: skip
    table = make_table(("channel", "card", "package", "by", "at", "why"), rows)
    nothing = f"{store.url} has no channels{f' of {name}' if name else ''}"
    listed = [
        {"name": name, "variant": variant, "channel": channel.name, "card": channel.card}
        | {"moves": [move.to_json() for move in channel.moves]}
        for name, variant, channel in found
    ]
    return Answer(value={"channels": listed}, shown=[table if found else nothing])


@answering
def gc(
    delete: Annotated[
        bool, typer.Option("--delete", help="Remove; without it this only shows.")
    ] = False,
    keep_days: Annotated[
        float, typer.Option(min=0, help="Keep what was signed, tested or yanked since.")
    ] = 30.0,
    damaged: Annotated[
        bool, typer.Option("--damaged", help="Damaged versions may go like others.")
    ] = False,
    registry: Registry = ARTIFACTS,
    policy: Policy = None,
) -> Answer:
    """Show versions that nothing needs; remove with --delete."""
    from pipeline.registry.inventory import collect

    store, trust = open_registry(registry, policy)
    done = collect(store, trust, keep_days=keep_days, damaged=damaged, delete=delete)
    return _answer_gc(done, delete=delete)


def _answer_gc(done: Collected, *, delete: bool) -> Answer:
    from rich.filesize import decimal

    remove = printable("remove", "yellow")
    table = make_table(
        ("", "package", "size", "why"),
        (
            (remove if fate.remove else "keep", str(fate.place),
             "?" if fate.size_bytes is None else decimal(fate.size_bytes), fate.why)
            for fate in sorted(done.fates, key=lambda one: (not one.remove, one.place))
        ),
    )  # fmt: skip
    go = [fate.size_bytes or 0 for fate in done.fates if fate.remove]
    would = f"{len(go)} versions of {sum(go)} bytes would go; nothing was removed, --delete removes"
    gone = f"removed {len(done.removed)} versions; a later gc frees their {done.freed_bytes} bytes"
    lines = [gone if delete else would]
    lines += [f"{'removed' if delete else 'left over'}: {words}" for words in done.leftovers]
    value = {
        "deleted": delete,
        "versions": [
            {"reference": str(one.place)}
            | {name: getattr(one, name) for name in ("remove", "why", "size_bytes")}
            for one in done.fates
        ],
        "removed": [str(place) for place in done.removed],
        "freed_bytes": done.freed_bytes,
        "leftovers": list(done.leftovers),
    }
    return Answer(value=value, shown=[*([table] if done.fates else []), *lines])


def _releaser(registry: str, policy: Path | None, reason: str) -> Releaser:
    from pipeline.registry.promotion import Releaser
    from pipeline.registry.trust.signing import actor_of, require_signing_key

    store, trust = open_registry(registry, policy)
    key, actor = require_signing_key(os.environ, local=store.local), actor_of(os.environ)
    return Releaser(store=store, policy=trust, key=key, actor=actor, reason=reason)


def _answer_move(done: Moved) -> Answer:
    move, was = done.move, f"it was {done.before or 'nowhere'}"
    lines = [
        f"{move.channel} of {move.card} is {move.reference} "
        f"({was if done.changed else 'it was so already'})",
        f"digest  sha256:{move.reference.digest}",
        f"because {done.verdict.verdict} on {done.verdict.card}, signed by {done.verdict.signer}",
    ]
    value = {
        **move.to_json(),
        "changed": done.changed,
        "before": str(done.before) if done.before else None,
        "verdict": done.verdict.verdict,
    }
    return Answer(value=value, shown=lines)
