"""How long a command waits for one server: the deadline and the floor of all network traffic.

Waiting spends patience; bytes at the floor's pace and whole replies earn it back.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator

from pipeline.core.errors import Fault, RecipeError, TransientError

SETTING = "ENGINESMITH_PATIENCE"
"""For slow networks: with 4, all times are four times as long, and the floor a quarter."""
try:
    FACTOR = min(max(float(os.environ.get(SETTING) or 1), 0.001), 1000)
except ValueError as error:
    raise RecipeError([Fault(SETTING, f"must be a number: {error}")]) from error
FLOOR_BYTES_PER_S = (16 << 10) / FACTOR
PATIENCE_S = 60.0 * FACTOR
"""With the silence that it ends in, and that of other threads, 100 s."""
REPLY_S = 1.0 * FACTOR
"""What a reply earns: a server that answers each request within a second may be asked for ever."""


class Patience:
    """How much longer a server may let us wait; all threads that ask it share this."""

    def __init__(self, seconds: float | None = None) -> None:
        self._most_s = self._left_s = PATIENCE_S if seconds is None else seconds
        self._waiting, self._since_s, self._lock = 0, 0.0, threading.Lock()

    def left_s(self, *, waiting: int = 0, earned_s: float = 0.0) -> float:
        """What is left; a second is spent once, however many threads wait in it."""
        with self._lock:
            now_s = time.monotonic()
            spent_s = now_s - self._since_s if self._waiting else 0.0
            self._left_s = min(self._left_s - spent_s + earned_s, self._most_s)
            self._since_s, self._waiting = now_s, self._waiting + waiting
            return self._left_s

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around all that waits for the server."""
        self.left_s(waiting=1)
        try:
            yield
        finally:
            self.left_s(waiting=-1)

    def require(self, what: str, received_bytes: int = 0) -> float:
        """What is left, with these bytes; a TransientError if nothing is."""
        left_s = self.left_s(earned_s=received_bytes / FLOOR_BYTES_PER_S)
        if left_s <= 0:
            floor = f"less than {FLOOR_BYTES_PER_S / 1024:.0f} KiB/s in {self._most_s:.0f} s"
            raise TransientError(f"{what} sent {floor}; check the network, or raise {SETTING}")
        return left_s
