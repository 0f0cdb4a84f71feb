"""The command `enginesmith`, also `python -m pipeline.cli`.

Each command imports what it needs: `--help` and the registry client start without Hydra or torch.
"""

from __future__ import annotations

import json
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline import __version__
from pipeline.errors import ExitCode, PipelineError

if TYPE_CHECKING:
    from pipeline.registry.backend import Entry

app = typer.Typer(
    help="From a Hugging Face model to a checked, published FP8 inference engine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="Its name.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="What differs from the recipe: compiler.max_batch_size=8, target=l4.",
        show_default=False,
    ),
]
ConfigDir = Annotated[
    Path | None, typer.Option(help="Folder with recipes of your own; ./recipes is searched too.")
]
Json = Annotated[bool, typer.Option("--json", help="For programs.")]
Registry = Annotated[Path, typer.Option(help="Folder of the registry.")]
Reference = Annotated[
    str, typer.Argument(metavar="REF", help="NAME[/VARIANT][:VERSION|:CHANNEL]", show_default=False)
]

_ARTIFACTS = Path("artifacts")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"enginesmith {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def build(
    recipe: Recipe,
    overrides: Overrides = None,
    multirun: Annotated[
        bool, typer.Option("-m", "--multirun", help="Several recipes (a,b) or values (key=1,2).")
    ] = False,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Build again what is already published.")
    ] = False,
    config_dir: ConfigDir = None,
) -> None:
    """Build, check and publish the engine of a recipe."""
    from pipeline.__main__ import Request, run

    request = Request(
        recipes=recipe,
        overrides=tuple(overrides or ()),
        multirun=multirun,
        rebuild=rebuild,
        config_dir=config_dir,
    )
    raise typer.Exit(run(request))


@app.command()
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    as_json: Json = False,
    config_dir: ConfigDir = None,
) -> None:
    """Show size, fit and speed ceilings of a recipe, without downloading anything."""
    from dataclasses import asdict

    from pipeline.config.folders import config_folders
    from pipeline.config.load import load
    from pipeline.errors import RecipeError

    loaded = load(recipe, overrides or (), folders=config_folders(config_dir))
    faults = [*loaded.faults, *(fault for job in loaded.jobs for fault in job.faults)]
    if faults:
        if as_json:
            print(json.dumps({"schema": 1, "faults": [asdict(fault) for fault in faults]}))
        raise RecipeError(faults)

    from pipeline.build import plan_of
    from pipeline.plan import render
    from pipeline.screen import stdout

    made = plan_of(loaded.jobs[0].value)
    if as_json:
        print(json.dumps(made.to_json(), indent=1))
    else:
        stdout().print(render(made))
    raise typer.Exit(ExitCode.USAGE if made.faults else ExitCode.OK)


@app.command()
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
) -> None:
    """Write a recipe for a model: pinned commit, the largest shape that fits the card."""
    from pipeline.new.command import new_recipe, report

    made = new_recipe(name, origin=origin, revision=revision, target=target, config_dir=config_dir)
    print("\n".join(report(made, config_dir)))


class _CacheDtype(StrEnum):
    FP8 = "fp8"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class _Dtype(StrEnum):
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


@app.command("export-trtllm")
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
    tp_size: Annotated[int, typer.Option(help="Must be 1.")] = 1,
    pp_size: Annotated[int, typer.Option(help="Must be 1.")] = 1,
) -> None:
    """Convert an FP8 checkpoint for TensorRT-LLM 1.2.1, and print the command that builds it."""
    from pipeline import export_trtllm as export
    from pipeline.screen import screen_logging

    sizes = export.build_sizes(
        checkpoint_dir,
        max_batch_size=max_batch_size,
        max_seq_len=max_seq_len,
        max_num_tokens=max_num_tokens,
    )
    with screen_logging():
        record = export.export_trtllm(
            checkpoint_dir,
            out_dir,
            kv_cache_dtype=kv_cache_dtype.value if kv_cache_dtype else None,
            dtype=dtype.value,
            tp_size=tp_size,
            pp_size=pp_size,
        )
    print(export.build_line(out_dir, record.kv_cache_dtype, sizes))


@app.command()
def rehearse(
    recipe: Recipe,
    overrides: Overrides = None,
    full_size: Annotated[
        bool, typer.Option("--full-size", help="The real shape and sizes, which takes long.")
    ] = False,
    keep: Annotated[
        Path | None, typer.Option(help="Keep what is made, in this new or empty folder.")
    ] = None,
    as_json: Json = False,
    config_dir: ConfigDir = None,
) -> None:
    """Run a recipe's whole line on random weights, in every format; nothing is downloaded."""
    from pipeline.rehearse.command import run_rehearsal

    raise typer.Exit(
        run_rehearsal(
            recipe,
            tuple(overrides or ()),
            full_size=full_size,
            keep=keep,
            as_json=as_json,
            config_dir=config_dir,
        )
    )


@app.command("list")
def list_packages(registry: Registry = _ARTIFACTS, as_json: Json = False) -> None:
    """List the published packages."""
    from pipeline.registry.folder import FolderRegistry
    from pipeline.registry.render import render_list
    from pipeline.screen import stdout

    entries = FolderRegistry(path=registry).entries()
    if as_json:
        print(json.dumps([_summary(entry) for entry in entries], indent=1))
    elif entries:
        stdout().print(render_list(entries))
    else:
        print(f"{registry} has no packages; make one with: enginesmith build RECIPE")


@app.command()
def show(reference: Reference, registry: Registry = _ARTIFACTS, as_json: Json = False) -> None:
    """Show one package: what it is for, what was measured, its digest."""
    from pipeline.registry.folder import FolderRegistry
    from pipeline.registry.render import render_show
    from pipeline.screen import stdout

    entry = FolderRegistry(path=registry).entry(reference)
    if as_json:
        manifest = entry.package.manifest if entry.package else None
        print(json.dumps({**_summary(entry), "manifest": manifest}, indent=1))
    else:
        stdout().print(render_show(entry))
    raise typer.Exit(ExitCode.CORRUPT if entry.fault else ExitCode.OK)


@app.command()
def keygen(
    out: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="By default signing.key in ~/.config/enginesmith."),
    ] = None,
) -> None:
    """Make a key pair to sign packages with."""
    from pipeline.registry.signing import command

    print("\n".join(command.keygen(out, os.environ)))


@app.command()
def verify(
    target: Annotated[
        str, typer.Argument(metavar="REF|DIR", help="A package.", show_default=False)
    ],
    registry: Registry = _ARTIFACTS,
    policy: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Who may sign; by default $ENGINESMITH_POLICY, then ~/.config/enginesmith/"
            "policy.yaml, then this machine's own key.",
        ),
    ] = None,
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
        "digest": entry.package.digest if entry.package else None,
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
    }


@app.command()
def generate(
    reference: Reference,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="What to ask.", show_default=False)
    ],
    max_tokens: Annotated[int, typer.Option(min=1, help="End the answer after this many.")] = 256,
    registry: Registry = _ARTIFACTS,
) -> None:
    """Stream a chat answer from a package."""
    from pipeline.registry.folder import FolderRegistry
    from pipeline.runners.generate import stream

    for piece in stream(FolderRegistry(path=registry), reference, prompt, max_tokens):
        print(piece, end="", flush=True)
    print()


def main() -> int:
    """Run a command; the only place where its exceptions become a message and an exit code."""
    try:
        app(prog_name="enginesmith")
    except Exception as error:
        from pipeline.outcome import failure_of
        from pipeline.screen import show_error

        outcome = failure_of(error)
        show_error(outcome.message)
        return outcome.exit_code
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
