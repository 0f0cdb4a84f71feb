"""Commands that look at packages: list, show, verify, generate."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.commands.answer import Answer
from pipeline.commands.answering import answering
from pipeline.commands.arguments import ARTIFACTS, Policy, Reference, Registry
from pipeline.core.errors import ExitCode

if TYPE_CHECKING:
    from pipeline.registry.backend import Entry


@answering
def list_packages(registry: Registry = ARTIFACTS) -> Answer:
    """List the published packages."""
    from pipeline.registry.render import render_list
    from pipeline.registry.stores.opening import open_registry

    entries = open_registry(registry).entries()
    nothing = f"{registry} has no packages; make one with: enginesmith build RECIPE"
    return Answer(
        value={"packages": [_summary(entry) for entry in entries]},
        shown=[render_list(entries) if entries else nothing],
    )


@answering
def show(
    reference: Reference,
    registry: Registry = ARTIFACTS,
    policy: Policy = None,
) -> Answer:
    """Show one package: what it is for, what was measured, its digest, who signed it."""
    from pipeline.registry.render import render_show
    from pipeline.registry.signing.machine import machine_trust
    from pipeline.registry.signing.summary import Signatures, signatures_of
    from pipeline.registry.stores.opening import open_registry

    opened = open_registry(registry)
    trust = machine_trust(os.environ, own_folder=opened.local, policy=policy)
    entry = opened.entry(reference, policy=trust)
    signatures = Signatures(reason="damaged, so no signature says anything")
    if entry.reference:
        signatures = signatures_of(entry, opened.statements_dir(entry.reference), trust)
    return Answer(
        value={
            **_summary(entry),
            "signatures": signatures.to_json(),
            "manifest": entry.manifest,
        },
        shown=[render_show(entry, signatures)],
        exit_code=ExitCode.CORRUPT if entry.fault else ExitCode.OK,
        message=entry.fault,
    )


@answering
def verify(
    target: Annotated[
        str, typer.Argument(metavar="REF|DIR", help="A package.", show_default=False)
    ],
    registry: Registry = ARTIFACTS,
    policy: Policy = None,
    allow_unsigned: Annotated[
        bool, typer.Option("--allow-unsigned", help="Take a package that nobody signed.")
    ] = False,
) -> Answer:
    """Verify every byte of a package, its signatures, and who made them."""
    from pipeline.registry.signing import command

    request = command.Request(
        target=target, registry=registry, policy=policy, allow_unsigned=allow_unsigned
    )
    done = command.run_verify(request, os.environ)
    return Answer(value=command.report_json(done, request), shown=command.report_lines(done))


def _summary(entry: Entry) -> dict[str, Any]:
    """One published version for programs; later versions only add."""
    return {
        "reference": f"{entry.name}/{entry.variant}:{entry.version}",
        "digest": entry.digest,
        "size_bytes": entry.size_bytes,
        "verdict": entry.verdict,
        "channels": [
            {"channel": pointer.channel, "card": pointer.card} for pointer in entry.channels
        ],
        "statements": [
            {"name": found.name, "verdict": found.verdict, "card": found.card}
            for found in entry.statements
        ],
        "made_s": entry.made_s,
        "fault": entry.fault or None,
        "yanked": entry.yanked or None,
    }


@answering
def generate(
    reference: Reference,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="What to ask.", show_default=False)
    ],
    max_tokens: Annotated[int, typer.Option(min=1, help="End the answer after this many.")] = 256,
    registry: Registry = ARTIFACTS,
    as_json: bool = False,
) -> Answer:
    """Stream a chat answer from a package."""
    from pipeline.commands.generating import stream
    from pipeline.registry.stores.opening import open_registry

    text = ""
    for piece in stream(open_registry(registry), reference, prompt, max_tokens):
        text += piece
        if not as_json:
            print(piece, end="", flush=True)
    return Answer(value={"reference": reference, "prompt": prompt, "text": text}, shown=[""])
