"""The command that copies packages between registries."""

from __future__ import annotations

import json
import os
from typing import Annotated

import typer

from pipeline.commands.arguments import Json, Policy, Reference
from pipeline.errors import PipelineError


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
    as_json: Json = False,
) -> None:
    """Copy a package, its signatures and its test results to another registry, byte for byte."""
    from pipeline.registry.copying import CopyRequest, run_copy
    from pipeline.registry.signing.command import failure_json
    from pipeline.screen import screen_logging

    request = CopyRequest(
        reference=reference,
        source=source,
        target=target,
        policy=policy,
        allow_unsigned=allow_unsigned,
    )
    try:
        with screen_logging():
            done = run_copy(request, os.environ)
    except PipelineError as error:
        if as_json:
            print(json.dumps(failure_json(error)))
        raise
    print(
        json.dumps(done.to_json(request), indent=1) if as_json else "\n".join(done.lines(request))
    )
