"""The command that races a recipe's artifact against other runtimes: race."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.answer import Answer
from pipeline.commands.answering import answering
from pipeline.commands.arguments import ConfigDir, Overrides, Recipe


@answering
def race(
    recipe: Recipe,
    overrides: Overrides = None,
    only: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,…",
            help="Peers: vllm-bf16, vllm-fp8, vllm-fp8-kv8, transformers; by default all.",
        ),
    ] = None,
    workloads: Annotated[
        str | None,
        typer.Option(
            metavar="bN,…",
            help="Batches; by default b1,b8,b64,b128 up to compiler.max_batch_size.",
        ),
    ] = None,
    isl: Annotated[int, typer.Option(min=1, help="Tokens of every prompt.")] = 128,
    osl: Annotated[int, typer.Option(min=1, help="Output tokens of every request.")] = 256,
    rounds: Annotated[
        int, typer.Option(min=1, help="Timed rounds of each pair; transformers gets 3 at most.")
    ] = 10,
    random_weights: Annotated[
        bool,
        typer.Option(
            "--random-weights", help="Race on random weights of the shape; downloads nothing."
        ),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the race in --out; what is there counts.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="By default artifacts/.runs/race-RECIPE."),
    ] = None,
    time_limit_s: Annotated[
        float | None,
        typer.Option(min=1, help="Start no round that would end later; go on with --resume."),
    ] = None,
    config_dir: ConfigDir = None,
) -> Answer:
    """Race a recipe's FP8 artifact against vLLM and Transformers on this machine's GPU."""
    from pipeline.acceptance.race.command import run_race_command
    from pipeline.acceptance.race.request import Request

    request = Request(
        recipe=recipe,
        overrides=tuple(overrides or ()),
        only=tuple(dict.fromkeys(_listed(only))),
        batches=tuple(_batch(name) for name in _listed(workloads)),
        isl=isl,
        osl=osl,
        rounds=rounds,
        random_weights=random_weights,
        resume=resume,
        out=out,
        time_limit_s=time_limit_s,
        config_dir=config_dir,
    )
    return run_race_command(request)


def _listed(value: str | None) -> list[str]:
    return [name.strip() for name in (value or "").split(",") if name.strip()]


def _batch(name: str) -> int:
    """The batch of `b8`.

    Raises:
        RecipeError: It is written otherwise.
    """
    from pipeline.core.errors import Fault, RecipeError

    if not re.fullmatch(r"b[1-9][0-9]{0,4}", name):
        fault = f"{name!r} is no workload; write b and the batch, such as b1,b8,b64"
        raise RecipeError([Fault("--workloads", fault)])
    return int(name[1:])
