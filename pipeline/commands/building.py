"""Commands that make engines: build, plan, new, export-trtllm, rehearse."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pipeline.answer import Answer, answering, screen_logging
from pipeline.commands.arguments import ConfigDir, Overrides, Recipe, RecipesRegistry
from pipeline.core.errors import ExitCode, RecipeError


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
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    config_dir: ConfigDir = None,
) -> Answer:
    """Show size, fit and speed ceilings of a recipe, without downloading anything."""
    from pipeline.config.folders import config_folders
    from pipeline.config.load import load

    composed = load(recipe, overrides or (), folders=config_folders(config_dir)).value
    from pipeline.build import plan_of
    from pipeline.outcome import refused
    from pipeline.plan import render

    made = plan_of(composed)
    return Answer(
        value=made.to_json(),
        shown=[render(made)],
        exit_code=ExitCode.USAGE if made.faults else ExitCode.OK,
        message=refused(made.faults).message,
        faults=made.faults,
    )


@answering
def config(
    recipe: Recipe,
    overrides: Overrides = None,
    config_dir: ConfigDir = None,
) -> Answer:
    """Print a recipe as it is composed: every value, defaults and overrides merged."""
    from pipeline.config.folders import config_folders
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
    """Write a recipe for a model: pinned commit, the largest shape that fits the card."""
    from pipeline.new import new_recipe, report

    made = new_recipe(name, origin=origin, revision=revision, target=target, config_dir=config_dir)
    return Answer(value=made.to_json(), shown=report(made, config_dir))


class _CacheDtype(StrEnum):
    FP8 = "fp8"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class _Dtype(StrEnum):
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


@answering
def export_trtllm(
    checkpoint_dir: Annotated[
        Path,
        typer.Argument(metavar="CHECKPOINT_DIR", help="Unified FP8.", show_default=False),
    ],
    out_dir: Annotated[
        Path, typer.Argument(metavar="OUT_DIR", help="New or empty.", show_default=False)
    ],
    kv_cache_dtype: Annotated[
        _CacheDtype | None, typer.Option(help="By default as the checkpoint declares.")
    ] = None,
    dtype: Annotated[
        _Dtype, typer.Option(help="Of activations and of what is not FP8.")
    ] = _Dtype.BFLOAT16,
    max_batch_size: Annotated[int, typer.Option(min=1, help="For the printed command.")] = 64,
    max_seq_len: Annotated[
        int | None, typer.Option(min=1, help="For the printed command; by default 4096 at most.")
    ] = None,
    max_num_tokens: Annotated[
        int | None, typer.Option(min=1, help="For the printed command; by default 8192.")
    ] = None,
) -> Answer:
    """Convert an FP8 checkpoint for TensorRT-LLM 1.2.1, and print the command that builds it."""
    from pipeline.formats.trtllm.export import plan_export
    from pipeline.plan.findings import checkpoint_faults

    export = plan_export(
        checkpoint_dir,
        out_dir,
        kv_cache_dtype=kv_cache_dtype.value if kv_cache_dtype else None,
        dtype=dtype.value,
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
    value = {
        **record,
        "checkpoint_dir": str(out_dir.absolute()),
        "command": export.command,
    }
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
    """Run a recipe's whole line on random weights, in every format; nothing is downloaded."""
    from pipeline.rehearse import run_rehearsal

    return run_rehearsal(
        recipe,
        tuple(overrides or ()),
        full_size=full_size,
        keep=keep,
        config_dir=config_dir,
    )
