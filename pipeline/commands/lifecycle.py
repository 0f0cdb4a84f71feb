"""Commands that move channels and remove versions: promote, rollback, yank, gc, channels."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.commands.arguments import ARTIFACTS, Json, Policy, Reference, Registry

if TYPE_CHECKING:
    from pipeline.registry.lifecycle.command import Answer

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
    as_json: Json = False,
) -> None:
    """Move a channel to a package with a signed test result that is good enough for it."""
    from pipeline.registry.lifecycle import command

    def act() -> Answer:
        return command.run_promote(
            command.open_desk(registry, policy, os.environ),
            reference,
            channel=channel,
            card=card,
            reason=reason,
            restart=restart_log,
        )

    _finish(_asked(act, as_json), as_json)


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
    as_json: Json = False,
) -> None:
    """Move a channel back to where it pointed before."""
    from pipeline.registry.lifecycle import command

    def act() -> Answer:
        return command.run_rollback(
            command.open_desk(registry, policy, os.environ),
            name,
            channel=channel,
            card=card,
            to=to,
            reason=reason,
        )

    _finish(_asked(act, as_json), as_json)


def yank(
    reference: Reference,
    reason: _Reason = "",
    undo: Annotated[bool, typer.Option("--undo", help="Make it usable again.")] = False,
    registry: Registry = ARTIFACTS,
    policy: Policy = None,
    as_json: Json = False,
) -> None:
    """Stop a package from being pulled, but by its digest and with --allow-yanked."""
    from pipeline.registry.lifecycle import command

    def act() -> Answer:
        desk = command.open_desk(registry, policy, os.environ)
        return command.run_yank(desk, reference, reason=reason, undo=undo)

    _finish(_asked(act, as_json), as_json)


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
    as_json: Json = False,
) -> None:
    """Show which versions nothing needs any more, and remove them with --delete."""
    from pipeline.registry.lifecycle import command

    def act() -> Answer:
        answer, done = command.run_gc(
            command.open_desk(registry, policy, os.environ),
            delete=delete,
            keep_days=keep_days,
            history=history,
            keep=keep or (),
            damaged=damaged,
        )
        if not as_json and done.fates:
            from pipeline.registry.lifecycle.render import render_fates
            from pipeline.screen import stdout

            stdout().print(render_fates(done.fates))
        return answer

    _finish(_asked(act, as_json), as_json)


def channels(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME[/VARIANT]", help="By default all.", show_default=False),
    ] = None,
    history: Annotated[bool, typer.Option("--history", help="All moves, newest first.")] = False,
    registry: Registry = ARTIFACTS,
    policy: Policy = None,
    as_json: Json = False,
) -> None:
    """Show where the channels point, by their signed logs."""
    from pipeline.registry.lifecycle import command

    def act() -> Answer:
        desk = command.open_desk(registry, policy, os.environ)
        answer, shown = command.run_channels(desk, name)
        if not as_json and shown:
            from pipeline.registry.lifecycle.render import render_channels
            from pipeline.screen import stdout

            stdout().print(render_channels(shown, history=history))
        notes = [f"{one.channel} of {one.card}: {one.note}" for one in shown if one.note]
        return command.Answer(
            lines=[*answer.lines, *notes], value=answer.value, exit_code=answer.exit_code
        )

    _finish(_asked(act, as_json), as_json)


def _asked(act: Callable[[], Answer], as_json: bool) -> Answer:
    """What a command answers; a refusal is told to programs, too."""
    from pipeline.errors import PipelineError
    from pipeline.registry.signing.command import failure_json

    try:
        return act()
    except PipelineError as error:
        if as_json:
            print(json.dumps(failure_json(error)))
        raise


def _finish(answer: Answer, as_json: bool) -> None:
    if as_json:
        print(json.dumps(answer.to_json(), indent=1))
    else:
        print("\n".join(answer.lines))
    raise typer.Exit(answer.exit_code)
