"""Commands that look at packages: list, show, keygen, verify, generate."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.commands.arguments import ARTIFACTS, Json, Policy, Reference, Registry
from pipeline.errors import ExitCode, PipelineError

if TYPE_CHECKING:
    from pipeline.registry.backend import Entry


def list_packages(registry: Registry = ARTIFACTS, as_json: Json = False) -> None:
    """List the published packages."""
    from pipeline.registry.render import render_list
    from pipeline.registry.stores.opening import open_registry
    from pipeline.screen import stdout

    entries = open_registry(registry).entries()
    if as_json:
        print(json.dumps([_summary(entry) for entry in entries], indent=1))
    elif entries:
        stdout().print(render_list(entries))
    else:
        print(f"{registry} has no packages; make one with: enginesmith build RECIPE")


def show(
    reference: Reference,
    registry: Registry = ARTIFACTS,
    policy: Policy = None,
    as_json: Json = False,
) -> None:
    """Show one package: what it is for, what was measured, its digest, who signed it."""
    from pipeline.registry.render import render_show
    from pipeline.registry.signing.machine import machine_trust
    from pipeline.registry.signing.summary import Signatures, signatures_of
    from pipeline.registry.stores.opening import open_registry
    from pipeline.screen import stdout

    opened = open_registry(registry)
    trust = machine_trust(os.environ, own_folder=opened.local, policy=policy)
    entry = opened.entry(reference, policy=trust)
    signatures = Signatures(reason="damaged, so no signature says anything")
    if entry.reference:
        signatures = signatures_of(entry, opened.statements_dir(entry.reference), trust)
    if as_json:
        answer = {**_summary(entry), "signatures": signatures.to_json(), "manifest": entry.manifest}
        print(json.dumps(answer, indent=1))
    else:
        stdout().print(render_show(entry, signatures))
    raise typer.Exit(ExitCode.CORRUPT if entry.fault else ExitCode.OK)


def keygen(
    out: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="By default signing.key in ~/.config/enginesmith."),
    ] = None,
) -> None:
    """Make a key pair to sign packages with."""
    from pipeline.registry.signing import command

    print("\n".join(command.keygen(out, os.environ)))


def verify(
    target: Annotated[
        str, typer.Argument(metavar="REF|DIR", help="A package.", show_default=False)
    ],
    registry: Registry = ARTIFACTS,
    policy: Policy = None,
    allow_unsigned: Annotated[
        bool, typer.Option("--allow-unsigned", help="Take a package that nobody signed.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Verify every byte of a package, its signatures, and who made them."""
    from pipeline.registry.signing import command

    request = command.Request(
        target=target, registry=registry, policy=policy, allow_unsigned=allow_unsigned
    )
    try:
        done = command.run_verify(request, os.environ)
    except PipelineError as error:
        if as_json:
            print(json.dumps(command.failure_json(error)))
        raise
    if as_json:
        print(json.dumps(command.report_json(done, request), indent=1))
    else:
        print("\n".join(command.report_lines(done)))


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


def generate(
    reference: Reference,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="What to ask.", show_default=False)
    ],
    max_tokens: Annotated[int, typer.Option(min=1, help="End the answer after this many.")] = 256,
    registry: Registry = ARTIFACTS,
) -> None:
    """Stream a chat answer from a package."""
    from pipeline.registry.stores.opening import open_registry
    from pipeline.runners.generate import stream

    for piece in stream(open_registry(registry), reference, prompt, max_tokens):
        print(piece, end="", flush=True)
    print()
