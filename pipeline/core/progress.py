"""One progress bar for long work: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator

from rich import progress as bars
from rich.console import Console

log = logging.getLogger(__name__)

_LINE_EVERY_S = 15.0
BYTES = "bytes"
"""Unit whose amounts are shown as MB, with a rate."""


@contextlib.contextmanager
def progress(description: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Yield a function that reports finished units; `unit` is a plural, or `BYTES`."""
    # Bound now: a stderr that is redirected while the bar is up must not catch the bar.
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        if unit == BYTES:
            log.info("%s", description)
        yield _line_reporter(description, total, unit)
        return
    with bars.Progress(*_columns(unit), console=console, transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda count: bar.advance(task, count)


def _columns(unit: str) -> tuple[bars.ProgressColumn, ...]:
    text = bars.TextColumn("{task.description}")
    amount: tuple[bars.ProgressColumn, ...] = (
        bars.MofNCompleteColumn(),
        bars.TextColumn(f"{unit},"),
    )
    if unit == BYTES:
        amount = (bars.DownloadColumn(), bars.TransferSpeedColumn())
    return (text, bars.BarColumn(), *amount, bars.TimeRemainingColumn(), bars.TextColumn("left"))


def _line_reporter(description: str, total: int, unit: str) -> Callable[[int], None]:
    """A log line at most every `_LINE_EVERY_S`, with the time left."""
    started = last = time.monotonic()
    done = 0

    def report(count: int) -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last < _LINE_EVERY_S or not done:
            return
        last = now
        left_s = (now - started) / done * (total - done)
        amount = f"{done} of {total} {unit}"
        if unit == BYTES:
            rate = done / (now - started)
            amount = f"{done / 1e6:.0f} of {total / 1e6:.0f} MB, {rate / 1e6:.1f} MB/s"
        log.info("%s: %s, about %.0f s left", description, amount, left_s)

    return report
