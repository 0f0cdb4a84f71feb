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
def progress(
    description: str, total: int | None, unit: str, done: int = 0
) -> Iterator[Callable[[int], None]]:
    """Yield a function that reports finished units, beyond the `done` of an earlier run.

    `total` is None where only the passing time can be shown; `unit` is a plural, or `BYTES`.
    """
    # Bound now: a stderr that is redirected while the bar is up must not catch the bar.
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        if unit == BYTES:
            log.info("%s", description)
        yield _line_reporter(description, total, unit, done)
        return
    with bars.Progress(*_columns(total, unit), console=console, transient=True) as bar:
        task = bar.add_task(description, total=total, completed=done)
        yield lambda count: bar.advance(task, count)


def _columns(total: int | None, unit: str) -> tuple[bars.ProgressColumn, ...]:
    text = bars.TextColumn("{task.description}")
    if total is None:
        return (text, bars.SpinnerColumn(), bars.TimeElapsedColumn())
    amount: tuple[bars.ProgressColumn, ...] = (
        bars.MofNCompleteColumn(),
        bars.TextColumn(f"{unit},"),
    )
    if unit == BYTES:
        amount = (bars.DownloadColumn(), bars.TransferSpeedColumn())
    return (text, bars.BarColumn(), *amount, bars.TimeRemainingColumn(), bars.TextColumn("left"))


def _line_reporter(
    description: str, total: int | None, unit: str, before: int
) -> Callable[[int], None]:
    """A log line at most every `_LINE_EVERY_S`, with the time left."""
    started = last = time.monotonic()
    done = before

    def report(count: int) -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last < _LINE_EVERY_S or total is None or done <= before:
            return
        last = now
        left_s = (now - started) / (done - before) * (total - done)
        amount = f"{done} of {total} {unit}"
        if unit == BYTES:
            rate = (done - before) / (now - started)
            amount = f"{done / 1e6:.0f} of {total / 1e6:.0f} MB, {rate / 1e6:.1f} MB/s"
        log.info("%s: %s, about %.0f s left", description, amount, left_s)

    return report
