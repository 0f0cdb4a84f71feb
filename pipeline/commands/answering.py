"""`--json` for every command, and what it promises: one object on stdout, and nothing else."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Annotated

import typer

from pipeline.commands.answer import Answer, failure, tell

_NAME = "as_json"
_JSON = inspect.Parameter(
    _NAME,
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[bool, typer.Option("--json", help="Print one JSON object.")],
)


def answering(command: Callable[..., Answer]) -> Callable[..., None]:
    """A function that Typer can call: it has `--json`, tells the answer, exits with its code.

    A command that shows something before it is done takes `as_json` itself, and shows nothing then.
    """
    signature = inspect.signature(command, eval_str=True)
    knows = _NAME in signature.parameters
    others = [one for name, one in signature.parameters.items() if name != _NAME]

    @functools.wraps(command)
    def run(*, as_json: bool = False, **arguments: object) -> None:
        if knows:
            arguments[_NAME] = as_json
        with _clean_stdout() if as_json else contextlib.nullcontext():
            answer = _asked(functools.partial(command, **arguments))
        if isinstance(answer, Answer):
            tell(answer, as_json=as_json)
            if answer.exit_code:
                raise typer.Exit(answer.exit_code)
            return
        if as_json:
            print(json.dumps(failure(answer).to_json()), flush=True)
        raise answer  # the entry point tells people

    # Typer reads both.
    run.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*others, _JSON], return_annotation=None
    )
    run.__annotations__ = {one.name: one.annotation for one in (*others, _JSON)}
    return run


def _asked(command: Callable[[], Answer]) -> Answer | BaseException:
    """The answer, or what ended the command."""
    try:
        return command()
    except typer.Exit:
        raise
    except (Exception, KeyboardInterrupt) as error:
        return error


@contextlib.contextmanager
def _clean_stdout() -> Iterator[None]:
    """Send to stderr what the block prints to stdout: libraries' banners, other programs' too."""
    with contextlib.redirect_stdout(sys.stderr), contextlib.ExitStack() as after:
        with contextlib.suppress(OSError):  # somebody closed one of them
            kept = os.dup(1)
            after.callback(os.close, kept)
            os.dup2(2, 1)
            after.callback(os.dup2, kept, 1)
        yield
