"""Verify an engine where it lies."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.answer import Answer, answering, screen_logging
from pipeline.commands.arguments import Policy, Target, TargetRegistry, Unsigned
from pipeline.commands.pull import CARDS, Driver, Runtime, Unproven, Vram, Yanked, lines_of


@answering
def verify(
    target: Target,
    registry: TargetRegistry = None,
    gpu: Annotated[
        str, typer.Option(metavar=CARDS, help="Demand that it fits and is proven there.")
    ] = "none",
    runtime: Runtime = None,
    vram: Vram = None,
    driver: Driver = None,
    accept_unproven: Unproven = False,
    allow_unsigned: Unsigned = False,
    allow_yanked: Yanked = False,
    policy: Policy = None,
) -> Answer:
    """Verify a package: bytes, signatures, yanks, proofs."""
    from pipeline.registry.client import pull as client
    from pipeline.registry.client.machine import Flags
    from pipeline.registry.client.verify import verify as verify_target

    request = client.PullRequest(
        reference=target,
        registry=registry,
        flags=Flags(gpu=gpu, runtime=runtime, vram=vram, driver=driver),
        accept_unproven=accept_unproven,
        allow_unsigned=allow_unsigned,
        allow_yanked=allow_yanked,
        policy=policy,
    )
    with screen_logging():
        done = verify_target(request)
    return Answer(value=done.to_json(), shown=lines_of(done))
