"""Where messages go: short lines on stderr, results on stdout, every detail in build.log.

Tables may show text that a package or a store brought: it is shown, never obeyed.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

log = logging.getLogger(__name__)

_PLAIN_WIDTH = 120
"""Columns of a table that goes to a file or a pipe, where rich would assume 80."""


def stdout() -> Console:
    """A console for results."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_PLAIN_WIDTH)


def show_error(message: str) -> None:
    """Print a failure on stderr, unwrapped, so that paths in it can be copied."""
    from rich.console import Console
    from rich.text import Text

    text = Text.assemble(("error: ", "bold red"), message)
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

    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return Text(shown, style=style)


class _ScreenHandler(logging.Handler):
    """Our INFO and everybody's warnings on stderr.

    The stream is looked up each time: rich replaces it while a progress bar is up.
    """

    def emit(self, record: logging.LogRecord) -> None:
        ours = record.name.split(".")[0] == "pipeline"
        if ours or (record.levelno >= logging.WARNING and record.name != "py.warnings"):
            level = f"{record.levelname.lower()}: " if record.levelno > logging.INFO else ""
            now = time.strftime("%H:%M:%S", time.localtime(record.created))
            with contextlib.suppress(OSError, ValueError):  # stderr may be closed
                print(f"{now} {level}{record.getMessage()}", file=sys.stderr, flush=True)


class _FileHandler(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """A full disk stops the stage that fills it; the log need not say so once per line."""


@contextlib.contextmanager
def screen_logging() -> Iterator[None]:
    """Show the progress of the block on stderr."""
    handler = _ScreenHandler(logging.INFO)
    ours, root = logging.getLogger("pipeline"), logging.getLogger()
    before = ours.level, root.level
    ours.setLevel(logging.DEBUG)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    with _attached(handler):
        try:
            yield
        finally:
            logging.captureWarnings(False)
            ours.setLevel(before[0])
            root.setLevel(before[1])


@contextlib.contextmanager
def file_logging(path: Path) -> Iterator[None]:
    """Append everything that is logged in the block to a file, and the exception that ends it."""
    handler = _FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    with _attached(handler):
        try:
            yield
        except BaseException as error:
            log.debug("Stopped by %s", type(error).__name__, exc_info=error)
            raise


@contextlib.contextmanager
def _attached(handler: logging.Handler) -> Iterator[None]:
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        with contextlib.suppress(OSError):  # a full disk
            handler.close()
