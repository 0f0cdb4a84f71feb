"""Runs a function as another user: needs root, as the tests' engine does."""

from __future__ import annotations

import os
from collections.abc import Callable


def run_as(uid: int, groups: list[int], function: Callable[[], object]) -> str:
    """Call `function` in a child process of this uid and gid; what it raised, empty for nothing."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        message = ""
        try:
            os.setgroups(groups)
            os.setgid(uid)
            os.setuid(uid)
            function()
        except BaseException as error:
            message = f"{type(error).__name__}: {error}"
        finally:
            os.write(writer, message.encode())
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        message = stream.read()
    os.waitpid(child, 0)
    return message
