"""What a command answers: lines and tables for people, or one JSON object for programs.

The object is the same for every command, and stands alone on stdout, in one line:

    {"schema": 1, "exit_code": 0, ...}                                  what the command found
    {"schema": 1, "exit_code": 7, "message": "...", "faults": [], ...}  why it did not, what to do

`exit_code` is that of the process. `faults` are those of a recipe, of the command line or of a
registry, each with `path` and `message`. What a command found nevertheless stands beside them.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.core.errors import ExitCode, Fault

if TYPE_CHECKING:
    from rich.console import RenderableType

    from pipeline.outcome import Outcome

SCHEMA = 1
_NAME = "as_json"
_JSON = inspect.Parameter(
    _NAME,
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[bool, typer.Option("--json", help="Print one JSON object.")],
)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a command found or did.

    Attributes:
        value: For programs, beside `schema` and `exit_code`; later versions only add.
        shown: The same for people: lines, and what rich renders.
        exit_code: Of the command.
        message: With a bad exit code: what is wrong, and the next step.
        faults: With a bad exit code: one by one, as far as they can be told apart.
    """

    value: Mapping[str, Any] = field(default_factory=dict)
    shown: Sequence[RenderableType] = ()
    exit_code: ExitCode = ExitCode.OK
    message: str = ""
    faults: Sequence[Fault] = ()

    def to_json(self) -> dict[str, Any]:
        """The object that the module describes."""
        faults = [asdict(fault) for fault in self.faults]
        why = {"message": self.message, "faults": faults} if self.exit_code else {}
        return {"schema": SCHEMA, "exit_code": int(self.exit_code), **why, **self.value}


def failure(error: BaseException) -> Answer:
    """The answer of a command that ended with an exception."""
    from pipeline.outcome import failure_of

    outcome = failure_of(error)
    return Answer(exit_code=outcome.exit_code, message=outcome.message, faults=outcome.faults)


def answer_of(outcome: Outcome, document: Mapping[str, Any], generate: str = "") -> Answer:
    """What a command answers after one job, whose `verdict.json` is `document`.

    `generate` is the command that talks to the package; empty if there is nothing to say of it.
    """
    from pipeline.outcome import closing_lines

    lines = [outcome.message, closing_lines(outcome, generate)] if outcome.verdict else []
    return Answer(value=document, shown=lines, exit_code=outcome.exit_code, message=outcome.message)


def tell(answer: Answer, *, as_json: bool = False) -> None:
    """Print an answer; what is wrong goes to stderr, too, unless people see it on stdout."""
    from pipeline.commands.screen import show_error, stdout

    if as_json:
        print(json.dumps(answer.to_json()), flush=True)
    else:
        for part in answer.shown:
            if isinstance(part, str):
                print(part)
            else:
                stdout().print(part)
    if answer.exit_code and (as_json or not answer.shown):
        show_error(answer.message)


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
