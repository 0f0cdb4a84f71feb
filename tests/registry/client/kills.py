"""SIGKILL at seeded moments."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable


def killed_after(work: Callable[[], object], seconds: float) -> bool:
    """Run in a child that is killed; whether the kill came before the end."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            logging.disable()
            work()
            code = 0
        finally:
            os._exit(code)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def points(few: int) -> int:
    """How many kills: few by default, as many as `make test-soak` asks for else."""
    return int(os.environ.get("ENGINESMITH_SOAK_POINTS", few))
