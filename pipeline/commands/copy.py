"""The command that copies packages between registries."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from pipeline.commands.answer import Answer
from pipeline.commands.answering import answering
from pipeline.commands.arguments import Policy, Reference


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
    allow_unsigned: Annotated[
        bool, typer.Option("--allow-unsigned", help="Copy a package that nobody signed.")
    ] = False,
) -> Answer:
    """Copy a package, its signatures and its test results to another registry, byte for byte."""
    from pipeline.commands.screen import screen_logging
    from pipeline.registry.copying import CopyRequest, run_copy

    request = CopyRequest(
        reference=reference,
        source=source,
        target=target,
        policy=policy,
        allow_unsigned=allow_unsigned,
    )
    with screen_logging():
        done = run_copy(request, os.environ)
    return Answer(value=done.to_json(request), shown=done.lines(request))
