"""Try again what may work the second time; give up in bounded time."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from pipeline.core.errors import TransientError

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True)
class Retry:
    """How long to insist.

    Attributes:
        tries: Attempts in a row without a single new byte; then the fault is the user's to see.
            A transfer that gets on has its count begin again.
        tries_of_piece: Attempts for one piece, however far each came.
        first_s: Before the second attempt; doubled for each after it.
        longest_s: Longest wait.
    """

    tries: int = 6
    tries_of_piece: int = 40
    first_s: float = 0.5
    longest_s: float = 20.0

    def delay_s(self, failed: int) -> float:
        """How long to wait after `failed` attempts.

        Between half and all of the doubled time, by chance: a crowd of clients that a server
        dropped in one moment must not come back in one moment.
        """
        whole = min(self.longest_s, self.first_s * 2.0 ** (failed - 1))
        return whole * random.uniform(0.5, 1.0)


def insistently(call: Callable[[], _Result], retry: Retry) -> _Result:
    """Call until it works; for small requests, which have nothing to resume.

    Raises:
        TransientError: It failed `retry.tries` times.
    """
    for failed in range(1, retry.tries):
        try:
            return call()
        except TransientError as error:
            wait_s = retry.delay_s(failed)
            log.info("%s; trying again in %.1f s", error, wait_s)
            time.sleep(wait_s)
    return call()
