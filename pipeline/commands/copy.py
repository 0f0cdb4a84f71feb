"""The command that copies packages between registries."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from pipeline.commands.answer import Answer, answering
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
        bool, typer.Option("--allow-unsigned", help="Copy a package without a signature.")
    ] = False,
) -> Answer:
    """Copy a package, its signatures and its test results to another registry, byte for byte."""
    from pipeline.commands.screen import screen_logging
    from pipeline.registry import copying

    with screen_logging():
        done = copying.copy(
            reference,
            source,
            target,
            os.environ,
            policy=policy,
            allow_unsigned=allow_unsigned,
        )
    found, signer = done.resolved, done.resolved.verification.signer
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
