"""Commands that make engines and measure them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.answer import Answer, answer_of, answering, screen_logging
from pipeline.commands.arguments import (
    ARTIFACTS,
    ConfigDir,
    Overrides,
    Policy,
    Recipe,
    RecipesRegistry,
    Registry,
    Unsigned,
)
from pipeline.core.errors import ExitCode, Fault, RecipeError
from pipeline.run_log import file_logging


@answering
def build(
    recipe: Recipe,
    overrides: Overrides = None,
    registry: RecipesRegistry = None,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Build again what is already published.")
    ] = False,
    config_dir: ConfigDir = None,
) -> Answer:
    """Build, check and publish the engine of a recipe."""
    from pipeline.__main__ import Request, answer
    from pipeline.config.load import registry_overrides

    request = Request(
        recipe=recipe,
        overrides=(*(overrides or ()), *registry_overrides(registry)),
        rebuild=rebuild,
        config_dir=config_dir,
    )
    return answer(request)


@answering
def plan(recipe: Recipe, overrides: Overrides = None, config_dir: ConfigDir = None) -> Answer:
    """Show a recipe's size, fit and speed ceilings, offline."""
    from pipeline.config.compose import config_folders
    from pipeline.config.load import load

    composed = load(recipe, overrides or (), folders=config_folders(config_dir)).value
    from pipeline.build import plan_of
    from pipeline.outcome import refusal_of
    from pipeline.plan import render

    made = plan_of(composed)
    return Answer(
        value=made.to_json(),
        shown=[render(made)],
        exit_code=ExitCode.USAGE if made.faults else ExitCode.OK,
        message=refusal_of(made.faults).message,
        faults=made.faults,
    )


@answering
def config(recipe: Recipe, overrides: Overrides = None, config_dir: ConfigDir = None) -> Answer:
    """Print a recipe with all defaults and overrides merged."""
    from pipeline.config.compose import config_folders
    from pipeline.config.load import load

    job = load(recipe, overrides or (), folders=config_folders(config_dir))
    if job.faults:
        raise RecipeError(job.faults)
    return Answer(value={"config": job.config}, shown=[job.text])


@answering
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the recipe.", show_default=False)],
    origin: Annotated[
        str,
        typer.Option(
            "--from", metavar="HUB_ID|DIR", help="Whose config.json to read.", show_default=False
        ),
    ],
    target: Annotated[str, typer.Option(help="The card that it is for.")] = "rtx4090",
    revision: Annotated[
        str | None, typer.Option(metavar="COMMIT", help="On the Hub; by default the newest.")
    ] = None,
    config_dir: Annotated[
        Path | None, typer.Option(help="Where to write; by default ./recipes, else here.")
    ] = None,
) -> Answer:
    """Write a recipe for a model of the Hub or of a folder.

    It pins the commit, and takes the largest of our usual sizes that the card holds.
    """
    from pipeline.new import new_recipe, report

    made = new_recipe(name, origin=origin, revision=revision, target=target, config_dir=config_dir)
    return Answer(value=made.to_json(), shown=report(made, config_dir))


@answering
def export_trtllm(
    checkpoint_dir: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT_DIR", help="Unified FP8.", show_default=False)
    ],
    out_dir: Annotated[
        Path, typer.Argument(metavar="OUT_DIR", help="A new folder.", show_default=False)
    ],
    kv_cache_dtype: Annotated[
        Literal["fp8", "bfloat16", "float16"] | None,
        typer.Option(help="By default as the checkpoint declares."),
    ] = None,
    dtype: Annotated[
        Literal["bfloat16", "float16"],
        typer.Option(help="Of activations and of what is not FP8."),
    ] = "bfloat16",
    max_batch_size: Annotated[int, typer.Option(min=1, help="For the printed command.")] = 64,
    max_seq_len: Annotated[
        int | None, typer.Option(min=1, help="For the printed command; by default 4096 at most.")
    ] = None,
    max_num_tokens: Annotated[
        int | None, typer.Option(min=1, help="For the printed command; by default 8192.")
    ] = None,
) -> Answer:
    """Convert an FP8 checkpoint for TensorRT-LLM 1.2.1.

    Prints the command that builds the engine from it.
    """
    from pipeline.formats.trtllm.convert import plan_export
    from pipeline.plan import checkpoint_faults

    export = plan_export(
        checkpoint_dir,
        out_dir,
        kv_cache_dtype=kv_cache_dtype,
        dtype=dtype,
        max_batch_size=max_batch_size,
        max_seq_len=max_seq_len,
        max_num_tokens=max_num_tokens,
    )
    if faults := checkpoint_faults(
        architecture=export.architecture, kv_cache_dtype=export.kv_cache_dtype
    ):
        raise RecipeError(faults)
    with screen_logging():
        record = export.write()
    value = {**record, "checkpoint_dir": str(out_dir.absolute()), "command": export.command}
    return Answer(value=value, shown=[export.command])


@answering
def rehearse(
    recipe: Recipe,
    overrides: Overrides = None,
    full_size: Annotated[
        bool, typer.Option("--full-size", help="The real shape and sizes, which takes long.")
    ] = False,
    keep: Annotated[
        Path | None, typer.Option(help="Keep what is made, in this new or empty folder.")
    ] = None,
    config_dir: ConfigDir = None,
) -> Answer:
    """Try a recipe's whole line on tiny random weights.

    In every format; nothing is downloaded.
    """
    from pipeline.rehearse import run_rehearsal

    changed = tuple(overrides or ())
    return run_rehearsal(recipe, changed, full_size=full_size, keep=keep, config_dir=config_dir)


@answering
def accept(
    target: Annotated[
        str, typer.Argument(metavar="REF|DIR", help="A package.", show_default=False)
    ],
    overrides: Overrides = None,
    registry: Registry = ARTIFACTS,
    publish: Annotated[
        bool, typer.Option("--publish", help="Add the signed result to a remote registry, too.")
    ] = False,
    recipe: Annotated[
        str | None, typer.Option(metavar="NAME", help="By default the package's own.")
    ] = None,
    policy: Policy = None,
    allow_unsigned: Unsigned = False,
    config_dir: ConfigDir = None,
) -> Answer:
    """Measure a package on this machine's GPU; sign the result."""
    from pipeline.accept import AcceptRequest
    from pipeline.accept import accept as run
    from pipeline.outcome import failure_of, open_run, write_verdict
    from pipeline.registry.client.pull import PullRequest
    from pipeline.registry.stores import folder_of

    wanted = PullRequest(
        reference=target, registry=registry, policy=policy, allow_unsigned=allow_unsigned
    )
    request = AcceptRequest(
        wanted=wanted,
        publish=publish,
        overrides=tuple(overrides or ()),
        recipe=recipe,
        config_dir=config_dir,
    )
    run_dir = open_run(folder_of(registry) or Path(ARTIFACTS))
    with screen_logging(), file_logging(run_dir / "accept.log"):
        try:
            outcome = run(request, run_dir)
        except (Exception, KeyboardInterrupt) as error:
            outcome = failure_of(error)
    document = outcome.to_json(target, request.overrides)
    write_verdict(run_dir, document)
    return answer_of(outcome, document)


@answering
def race(
    recipe: Recipe,
    overrides: Overrides = None,
    cpu: Annotated[
        bool, typer.Option("--cpu", help="On this CPU: ONNX Runtime against Transformers.")
    ] = False,
    only: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,…",
            help="Peers: vllm-bf16, vllm-fp8, transformers; by default all that run here.",
        ),
    ] = None,
    workloads: Annotated[
        str | None,
        typer.Option(
            metavar="bN,…",
            help="Batches; by default b1,b8,b64,b128 up to compiler.max_batch_size (CPU: b1,b8).",
        ),
    ] = None,
    isl: Annotated[
        int | None, typer.Option(min=1, help="Tokens of every prompt; 128 (CPU: 64).")
    ] = None,
    osl: Annotated[
        int | None, typer.Option(min=1, help="Output tokens of every request; 256 (CPU: 64).")
    ] = None,
    rounds: Annotated[
        int,
        typer.Option(min=1, help="Timed rounds of each pair; transformers on a GPU: 3 at most."),
    ] = 10,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Of the shape; downloads nothing.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="By default artifacts/.runs/race-RECIPE.")
    ] = None,
    config_dir: ConfigDir = None,
) -> Answer:
    """Race a recipe's engine against vLLM and Transformers."""
    from pipeline.race import RaceRequest
    from pipeline.race import race as run

    request = RaceRequest(
        recipe=recipe,
        overrides=tuple(overrides or ()),
        cpu=cpu,
        only=tuple(dict.fromkeys(_split(only))),
        batches=tuple(_batch(name) for name in _split(workloads)),
        isl=isl,
        osl=osl,
        rounds=rounds,
        random_weights=random_weights,
        out=out or Path(ARTIFACTS) / ".runs" / f"race-{recipe}",
        config_dir=config_dir,
    )
    with screen_logging():
        return run(request)


def _split(value: str | None) -> list[str]:
    return [name.strip() for name in (value or "").split(",") if name.strip()]


def _batch(name: str) -> int:
    """The batch of `b8`; a RecipeError if it is written otherwise."""
    if not re.fullmatch(r"b[1-9][0-9]{0,4}", name):
        fault = f"{name!r} is no workload; write b and the batch, such as b1,b8,b64"
        raise RecipeError([Fault("--workloads", fault)])
    return int(name[1:])
