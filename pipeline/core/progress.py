"""One progress bar for a long loop: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

log = logging.getLogger(__name__)

_LINE_EVERY_S = 15.0


@contextlib.contextmanager
def progress(description: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Yield a function that reports finished units.

    Args:
        description: What is being done.
        total: How many units there are.
        unit: Name of a unit, plural.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _line_reporter(description, total, unit)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda count: bar.advance(task, count)


def _line_reporter(description: str, total: int, unit: str) -> Callable[[int], None]:
    """A log line at most every `_LINE_EVERY_S`, with the time left."""
    started = last = time.monotonic()
    done = 0

    def report(count: int) -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last >= _LINE_EVERY_S and done:
            last = now
            left = (now - started) / done * (total - done)
            log.info("%s: %d of %d %s, about %.0f s left", description, done, total, unit, left)

    return report
