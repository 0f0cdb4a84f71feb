"""The command that brings an engine to where it is served: pull."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.answer import Answer
from pipeline.commands.answering import answering
from pipeline.commands.arguments import ARTIFACTS, Policy


class _Format(StrEnum):
    CHECKPOINT = "checkpoint"
    TRTRTX = "trtrtx"
    TRTLLM = "trtllm"


@answering
def pull(
    reference: Annotated[
        str | None,
        typer.Argument(
            metavar="REF",
            help="NAME[/VARIANT][:VERSION|:CHANNEL] or NAME@sha256:DIGEST; without a variant the "
            "best for the machine.",
            show_default=False,
        ),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder to make; must not exist, or be empty."),
    ] = None,
    registry: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Folder, file:///PATH, s3://BUCKET/PREFIX or oci://HOST/REPOSITORY; by default "
            f"{ARTIFACTS}.",
        ),
    ] = None,
    gpu: Annotated[
        str,
        typer.Option(
            metavar="auto|CARD|sm89|none",
            help="What will run it: auto asks NVML; rtx4090, NVIDIA-GeForce-RTX-4090 or sm89 is "
            "believed; none checks nothing of it.",
        ),
    ] = "auto",
    runtime: Annotated[
        str | None, typer.Option(metavar="NAME==VERSION", help="What will load it: vllm==0.29.")
    ] = None,
    vram: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Device memory that it may use: 24GiB.")
    ] = None,
    driver: Annotated[
        str | None, typer.Option(metavar="VERSION", help="NVIDIA driver: 580.65.06.")
    ] = None,
    format: Annotated[_Format | None, typer.Option(help="Only this format.")] = None,
    channel: Annotated[
        str | None, typer.Option(help="In place of stable, where REF names none.")
    ] = None,
    accept_unproven: Annotated[
        bool,
        typer.Option("--accept-unproven", help="Take what was not tried on this card; recorded."),
    ] = False,
    allow_unsigned: Annotated[
        bool, typer.Option("--allow-unsigned", help="Take a package that nobody signed; recorded.")
    ] = False,
    allow_yanked: Annotated[
        bool,
        typer.Option(
            "--allow-yanked", help="Take a yanked package, named by its digest; recorded."
        ),
    ] = False,
    policy: Policy = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="From the cache alone: no network, no credentials.")
    ] = False,
    verify_only: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Pull nothing: verify a filled volume or a mounted image, which may be read-only.",
        ),
    ] = None,
    cache: Annotated[
        bool | None,
        typer.Option(
            "--cache/--no-cache",
            help="Keep a copy in the cache; by default unless the registry is a local folder.",
        ),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, max=64, help="Pieces that are fetched at once.")
    ] = None,
) -> Answer:
    """Fetch the engine that fits a machine: signatures first, every byte verified."""
    from pipeline.commands.screen import screen_logging
    from pipeline.core.errors import Fault, RecipeError
    from pipeline.registry.client import pull as client
    from pipeline.registry.client.machine import Flags

    request = client.PullRequest(
        reference=reference or "",
        to=to,
        registry=registry or (ARTIFACTS if verify_only is None else ""),
        flags=Flags(gpu=gpu, runtime=runtime, vram=vram, driver=driver),
        format=None if format is None else format.value,
        channel=channel,
        accept_unproven=accept_unproven,
        allow_unsigned=allow_unsigned,
        allow_yanked=allow_yanked,
        policy=policy,
        offline=offline,
        through_cache=cache,
        jobs=jobs,
    )
    with screen_logging():
        if verify_only is not None:
            if reference is not None or to is not None:
                fault = "verifies a folder in its place; leave out REF and --to"
                raise RecipeError([Fault("--verify-only", fault)])
            from pipeline.registry.client.verify_only import verify_only as verify

            done = verify(verify_only, request)
        elif reference is None or to is None:
            raise RecipeError([Fault("", "say what and where: enginesmith pull REF --to DIR")])
        else:
            done = client.run(request)
    return Answer(value=done.to_json(), shown=done.lines())
