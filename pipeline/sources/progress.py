"""One bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator

from rich import progress
from rich.console import Console

log = logging.getLogger(__name__)

_LINE_EVERY_S = 15.0


@contextlib.contextmanager
def shown(
    what: str, total_bytes: int | None = None, done_bytes: int = 0
) -> Iterator[Callable[[int], None]]:
    """Show on stderr that `what` is going on.

    Args:
        what: Such as `Downloading microsoft/Phi-3-mini-4k-instruct`.
        total_bytes: Size of the work; None where only the time that passes can be shown.
        done_bytes: How much of it an earlier run did.

    Yields:
        A function to call with every further number of bytes that got done.
    """
    # Bound now: whoever redirects stderr while the bar is up must not catch the bar.
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        log.info("%s", what)
        yield _lines(what, total_bytes or 0, done_bytes)
        return
    columns: tuple[progress.ProgressColumn, ...] = (
        progress.SpinnerColumn(),
        progress.TimeElapsedColumn(),
    )
    if total_bytes is not None:
        columns = (
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
        )
    text = progress.TextColumn("{task.description}")
    with progress.Progress(text, *columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total_bytes, completed=done_bytes)
        yield lambda count: bar.advance(task, count)


def _lines(what: str, total_bytes: int, done_bytes: int) -> Callable[[int], None]:
    """Log how far it got, now and then."""
    started = last = time.monotonic()
    done = done_bytes

    def advance(count: int) -> None:
        nonlocal last, done
        done += count
        now = time.monotonic()
        if now - last >= _LINE_EVERY_S:
            last = now
            rate = max(done - done_bytes, 1) / (now - started)
            log.info(
                "%s: %.0f of %.0f MB, %.1f MB/s, %.0f s left",
                what, done / 1e6, total_bytes / 1e6, rate / 1e6, (total_bytes - done) / rate,
            )  # fmt: skip

    return advance
