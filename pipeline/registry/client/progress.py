"""Rate and time left of bytes: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)

_LINE_EVERY_S = 15.0


@contextlib.contextmanager
def byte_progress(description: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that reports bytes that are there."""
    if not sys.stderr.isatty():
        yield _line_reporter(description, total_bytes)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total_bytes)
        yield lambda count: bar.advance(task, count)


def _line_reporter(description: str, total_bytes: int) -> Callable[[int], None]:
    """A log line at most every `_LINE_EVERY_S`."""
    started = last = time.monotonic()
    done = 0

    def report(count: int) -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last < _LINE_EVERY_S:
            return
        last = now
        rate = done / (now - started)
        left_s = max(0, total_bytes - done) / rate if rate else 0.0
        log.info(
            "%s: %.2f of %.2f GB, %.0f MB/s, about %.0f s left",
            description,
            done / 1e9,
            total_bytes / 1e9,
            rate / 1e6,
            left_s,
        )

    return report
