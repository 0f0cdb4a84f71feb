"""One progress bar for what takes long: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)

_LINE_EVERY_S = 15.0
_BYTES = "bytes"


def byte_progress(
    description: str, total_bytes: int
) -> contextlib.AbstractContextManager[Callable[[int], None]]:
    """`progress` of bytes, with their rate; the function may be called with fewer than none."""
    return progress(description, total_bytes, _BYTES)


@contextlib.contextmanager
def progress(description: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Yield a function that reports finished units.

    Args:
        description: What is being done.
        total: How many units there are.
        unit: Name of a unit, plural.
    """
    if not sys.stderr.isatty():
        yield _line_reporter(description, total, unit)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    counted = (
        (DownloadColumn(), TransferSpeedColumn())
        if unit == _BYTES
        else (MofNCompleteColumn(), TextColumn(unit), TimeElapsedColumn())
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        *counted,
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
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
        if now - last < _LINE_EVERY_S or done <= 0:
            return
        last = now
        rate = done / (now - started)
        amount = f"{done} of {total} {unit}"
        if unit == _BYTES:
            amount = f"{done / 1e9:.2f} of {total / 1e9:.2f} GB, {rate / 1e6:.0f} MB/s"
        log.info("%s: %s, about %.0f s left", description, amount, max(0, total - done) / rate)

    return report
