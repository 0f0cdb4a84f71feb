"""The command `enginesmith`, also `python -m pipeline.cli`.

Each command imports what it needs: `--help` and the registry client start without Hydra or torch.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Annotated, Any

import typer

from pipeline import __version__
from pipeline.answer import failure, tell
from pipeline.core.errors import ExitCode, Fault, RecipeError

_COMMANDS = {
    "build": "building.build",
    "plan": "building.plan",
    "config": "building.config",
    "new": "building.new",
    "rehearse": "building.rehearse",
    "export-trtllm": "building.export_trtllm",
    "accept": "building.accept",
    "race": "building.race",
    "list": "packages.list_packages",
    "show": "packages.show",
    "verify": "verify.verify",
    "pull": "pull.pull",
    "copy": "packages.copy",
    "generate": "packages.generate",
    "keygen": "lifecycle.keygen",
    "policy": "lifecycle.policy",
    "sign": "lifecycle.sign",
    "promote": "lifecycle.promote",
    "rollback": "lifecycle.rollback",
    "yank": "lifecycle.yank",
    "gc": "lifecycle.gc",
    "channels": "lifecycle.channels",
}
"""Command -> module below `commands`, and function."""


def _version(wanted: bool) -> None:
    if wanted:
        print(f"enginesmith {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def make_app(command: str = "") -> typer.Typer:
    """The program with all commands; with one alone if that is `command`, so a pull stays light."""
    app = typer.Typer(
        help="From a Hugging Face model to a checked, published, quantized inference engine.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback()(_options)
    for name in [command] if command in _COMMANDS else _COMMANDS:
        module, _, function = _COMMANDS[name].partition(".")
        app.command(name)(getattr(importlib.import_module(f"pipeline.commands.{module}"), function))
    return app


_UsageError: type[Any] = typer.BadParameter.__bases__[0]  # Typer exports no name for it


def main() -> int:
    """Run a command; the only place where its exceptions become a message and an exit code."""
    # Before torch is loaded: OpenMP's threads sleep while they wait for each other. By default they
    # spin, and beside other work the one that is waited for gets no core: with 7 busy processes on
    # 2 cores, 4 windows of SmolLM2 took 32 to 52 s spinning and 6 to 9 asleep (2026-11-30).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.umask(os.umask(0o077) | 0o002)  # what we write is never for everyone to change
    try:
        app = make_app(*sys.argv[1:2])
        return app(prog_name="enginesmith", standalone_mode=False) or ExitCode.OK
    except _UsageError as error:
        faults = [Fault("", error.format_message())]
        tell(failure(RecipeError(faults)), as_json="--json" in sys.argv[1:])
        return ExitCode.USAGE
    except Exception as error:
        answer = failure(error)
        tell(answer)
        return answer.exit_code


if __name__ == "__main__":
    sys.exit(main())
