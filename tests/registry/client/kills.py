"""SIGKILL at seeded steps of work with a store."""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

_STEPS: tuple[tuple[Any, str], ...] = (
    (http.client.HTTPConnection, "send"),
    (http.client.HTTPConnection, "getresponse"),
    (os, "fsync"),
)


@contextlib.contextmanager
def counted_steps(last: int | None = None) -> Iterator[list[str]]:
    """Collect what is done: each piece sent to a server, each answer awaited, each fsync.

    Args:
        last: Before this step, from 1 on, the process kills itself.
    """
    steps: list[str] = []

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def step(*args: object, **kwargs: object) -> object:
            steps.append(function.__name__)
            if len(steps) == last:
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)
            return function(*args, **kwargs)

        return step

    with contextlib.ExitStack() as stack:
        for owner, name in _STEPS:
            function = counted(getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, function))
        yield steps


def seeded_steps(steps: int, few: int) -> Iterator[int]:
    """Some of the first to the last step, spread over all of them; the first ones come first."""
    count, dice = points(few), random.Random(7)
    for number in range(count):
        yield 1 + int((number + dice.random()) / count * steps)


def killed_at(work: Callable[[], object], step: int) -> bool:
    """Run in a child that dies before a step of `counted_steps`; whether it got there."""

    def dying() -> None:
        with counted_steps(step):
            work()

    return _ended_by_kill(_forked(dying))


def killed_after(work: Callable[[], object], seconds: float) -> bool:
    """Run in a child that is killed; whether the kill came before the end."""
    pid = _forked(work)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    return _ended_by_kill(pid)


def points(few: int) -> int:
    """How many kills: few by default, as many as `make test-soak` asks for else."""
    return int(os.environ.get("ENGINESMITH_SOAK_POINTS", few))


def _forked(work: Callable[[], object]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            logging.disable()
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def _ended_by_kill(pid: int) -> bool:
    status = os.waitpid(pid, 0)[1]
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)
