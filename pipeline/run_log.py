"""The log of a run, for who looks into what happened."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from pipeline.answer import attached
from pipeline.core.errors import as_message

log = logging.getLogger(__name__)


class _FileHandler(logging.FileHandler):
    def format(self, record: logging.LogRecord) -> str:
        return as_message(super().format(record))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """A full disk stops the stage that fills it; the log need not say so once per line."""


@contextlib.contextmanager
def file_logging(path: Path) -> Iterator[None]:
    """Append everything that is logged in the block to a file, and the exception that ends it."""
    handler = _FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    with attached(handler):
        try:
            yield
        except BaseException as error:
            log.debug("Stopped by %s", type(error).__name__, exc_info=error)
            raise
