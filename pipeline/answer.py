"""What a command answers, and where messages go.

Results are lines and tables on stdout, or one JSON object for programs; short messages go to
stderr, every detail to build.log. Tables may show text that a package or a store brought: it is
shown, never obeyed.

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
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.core.errors import ExitCode, Fault, as_message, escaped

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

    from pipeline.outcome import Outcome

log = logging.getLogger(__name__)

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

    `value` is for programs, beside `schema` and `exit_code`, and later versions only add; `shown`
    is the same for people: lines, and what rich renders. With a bad exit code, `message` says what
    is wrong and the next step, and `faults` names one by one what can be told apart.
    """

    value: Mapping[str, Any] = field(default_factory=dict)
    shown: Sequence[RenderableType] = ()
    exit_code: ExitCode = ExitCode.OK
    message: str = ""
    faults: Sequence[Fault] = ()

    def to_json(self) -> dict[str, Any]:
        """See the module."""
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
    if as_json:
        print(escaped(json.dumps(answer.to_json())), flush=True)
    else:
        for part in answer.shown:
            if isinstance(part, str):
                print(escaped(part))
            else:
                _show(part)
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
        ended: BaseException | None = None
        with _clean_stdout() if as_json else contextlib.nullcontext():
            try:
                answer = command(**arguments)
            except (Exception, KeyboardInterrupt) as error:
                ended = error
        if ended is not None:
            if as_json:
                print(escaped(json.dumps(failure(ended).to_json())), flush=True)
            raise ended  # the entry point tells people
        tell(answer, as_json=as_json)
        if answer.exit_code:
            raise typer.Exit(answer.exit_code)

    # Typer reads both.
    run.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*others, _JSON], return_annotation=None
    )
    run.__annotations__ = {one.name: one.annotation for one in (*others, _JSON)}
    return run


@contextlib.contextmanager
def _clean_stdout() -> Iterator[None]:
    """Send to stderr what the block prints to stdout: libraries' banners, other programs' too."""
    with contextlib.redirect_stdout(sys.stderr), contextlib.ExitStack() as after:
        with contextlib.suppress(OSError):  # one of them was closed
            kept = os.dup(1)
            after.callback(os.close, kept)
            os.dup2(2, 1)
            after.callback(os.dup2, kept, 1)
        yield


_UNBROKEN = 10_000
"""Columns of a table that goes to a file or a pipe: each row is one line there, for grep."""


def _show(part: RenderableType) -> None:
    """Print a result for people; what they copy out of a narrow terminal stays in one piece."""
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_UNBROKEN)
        with console.capture() as captured:
            console.print(part)
        print("\n".join(line.rstrip() for line in captured.get().splitlines()))
        return
    unbroken = console.options.update(max_width=_UNBROKEN)
    widest = Measurement.get(console, unbroken, part).maximum
    if not (isinstance(part, Table) and part.show_header and widest > console.width):
        console.print(part)
        return
    for first, *rest in zip(*(column.cells for column in part.columns), strict=True):
        console.print(first, soft_wrap=True)
        cells = Text("  ").join(Text.assemble(cell) for cell in rest if str(cell))
        console.print(Text.assemble("  ", cells), soft_wrap=True)


def show_error(message: str) -> None:
    """Print a failure on stderr, unwrapped, so that paths in it can be copied."""
    from rich.console import Console
    from rich.text import Text

    text = Text.assemble(("error: ", "bold red"), as_message(message))
    Console(stderr=True).print(text, soft_wrap=True)


def make_table(columns: Sequence[str], rows: Iterable[Sequence[str | Text]] = ()) -> Table:
    """A table without lines."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=any(columns))
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(printable(cell) if isinstance(cell, str) else cell for cell in row))
    return table


def printable(text: str, style: str = "") -> Text:
    """Text without markup or control characters."""
    from rich.text import Text

    return Text(escaped(text), style=style)


class _ScreenHandler(logging.Handler):
    """Our INFO and all warnings on stderr.

    The stream is looked up each time: rich replaces it while a progress bar is up.
    """

    def emit(self, record: logging.LogRecord) -> None:
        ours = record.name.split(".")[0] == "pipeline"
        if ours or (record.levelno >= logging.WARNING and record.name != "py.warnings"):
            level = f"{record.levelname.lower()}: " if record.levelno > logging.INFO else ""
            now = time.strftime("%H:%M:%S", time.localtime(record.created))
            with contextlib.suppress(OSError, ValueError):  # stderr may be closed
                line = as_message(f"{now} {level}{record.getMessage()}")
                print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def screen_logging() -> Iterator[None]:
    """Show the progress of the block on stderr."""
    handler = _ScreenHandler(logging.INFO)
    ours, root = logging.getLogger("pipeline"), logging.getLogger()
    before = ours.level, root.level
    ours.setLevel(logging.DEBUG)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    with attached(handler):
        try:
            yield
        finally:
            logging.captureWarnings(False)
            ours.setLevel(before[0])
            root.setLevel(before[1])


@contextlib.contextmanager
def attached(handler: logging.Handler) -> Iterator[None]:
    """A handler of all that is logged in the block."""
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        with contextlib.suppress(OSError):  # a full disk
            handler.close()
