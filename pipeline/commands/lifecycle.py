"""Commands that move channels and remove versions: promote, rollback, yank, gc, channels."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from pipeline.commands.answer import Answer
from pipeline.commands.answering import answering
from pipeline.commands.arguments import ARTIFACTS, Policy, Reference, Registry

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
    restart_log: Annotated[
        bool,
        typer.Option(
            "--restart-log", help="Give up a log of moves that cannot be believed any more."
        ),
    ] = False,
    registry: Registry = ARTIFACTS,
    policy: Policy = None,
) -> Answer:
    """Move a channel to a package with a signed test result that is good enough for it."""
    from pipeline.registry.lifecycle import command
    from pipeline.registry.lifecycle import promote as moves

    desk = command.open_desk(registry, policy, os.environ)
    done = moves.promote(
        desk.store,
        reference,
        channel=channel,
        card=card,
        author=desk.author(reason),
        policy=desk.policy,
        restart=restart_log,
    )
    return command.moved(done)


@answering
def rollback(
    name: _Name,
    channel: _Channel = "stable",
    card: _Card = None,
    to: Annotated[
        str | None,
        typer.Option(
            metavar="REF",
            help="A package that was in this channel; by default the one before.",
            show_default=False,
        ),
    ] = None,
    reason: _Reason = "",
    registry: Registry = ARTIFACTS,
    policy: Policy = None,
) -> Answer:
    """Move a channel back to where it pointed before."""
    from pipeline.registry.lifecycle import command
    from pipeline.registry.lifecycle import promote as moves

    desk = command.open_desk(registry, policy, os.environ)
    done = moves.rollback(
        desk.store,
        name,
        channel=channel,
        card=card,
        author=desk.author(reason),
        policy=desk.policy,
        to=to,
    )
    return command.moved(done)


@answering
def yank(
    reference: Reference,
    reason: _Reason = "",
    undo: Annotated[bool, typer.Option("--undo", help="Make it usable again.")] = False,
    registry: Registry = ARTIFACTS,
    policy: Policy = None,
) -> Answer:
    """Stop a package from being pulled, but by its digest and with --allow-yanked."""
    from pipeline.registry.lifecycle import command

    desk = command.open_desk(registry, policy, os.environ)
    return command.run_yank(desk, reference, reason=reason, undo=undo)


@answering
def gc(
    delete: Annotated[
        bool, typer.Option("--delete", help="Remove; without it this only shows.")
    ] = False,
    keep_days: Annotated[
        float, typer.Option(min=0, help="Keep what was published or tested since; a day at least.")
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
    from pipeline.registry.lifecycle import command

    desk = command.open_desk(registry, policy, os.environ)
    return command.run_gc(
        desk,
        delete=delete,
        keep_days=keep_days,
        history=history,
        keep=keep or (),
        damaged=damaged,
    )


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
    """Show where the channels point, by their signed logs."""
    from pipeline.registry.lifecycle import command

    desk = command.open_desk(registry, policy, os.environ)
    return command.run_channels(desk, name, history=history)
