"""The one place that starts another program.

Its output goes to one log file as it comes, so that what a tool wrote before it died is kept. On
Ctrl-C, a timeout or any other exception the whole process group is killed; when this process itself
is killed, the kernel kills the program (`pipeline.core.launch`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.core import launch
from pipeline.core.errors import ToolError

log = logging.getLogger(__name__)

_POLL_S = 0.05
_GRACE_S = 3.0
_HEARTBEAT_S = 15.0
_LAST_LINES = 30
_LAUNCH = (sys.executable, "-I", "-S", launch.__file__)


_SECRET = re.compile(r"_(TOKEN|PASSWORD|SECRET|KEY|KEY_ID|PEM)$")


def child_environ(more: Mapping[str, str]) -> dict[str, str]:
    """This process's variables and `more`, less secrets: a tool that fails may log what it has."""
    return {name: text for name, text in os.environ.items() if not _SECRET.search(name)} | {**more}


@dataclass(frozen=True, kw_only=True)
class Started:
    """How a program is started: its arguments, and variables in addition to the current ones."""

    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)


def run_tool(
    command: Sequence[str],
    *,
    stage: str,
    log_path: Path,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 24 * 3600.0,
) -> None:
    """Run `command` to its end; command line and output are appended to the file `log_path`.

    ToolError if it could not start, exited non-zero, was killed by a signal, or ran out of time.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    log.debug("%s: %s", stage, command)
    with log_path.open("ab") as stream:
        stream.write(f"$ {list(command)!r}\n".encode())
        stream.flush()
        process = subprocess.Popen(
            [*_LAUNCH, str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=child_environ(env or {}),
            start_new_session=True,
        )
        try:
            timed_out = _wait(process, stage, timeout_s)
        finally:
            kill_group(process)
    if timed_out or process.returncode != 0:
        raise ToolError(
            stage=stage,
            command=command,
            returncode=process.returncode,
            log_path=log_path,
            last_lines=last_lines(log_path),
            hint=f"it was stopped after {timeout_s:.0f} s" if timed_out else "",
        )


def _wait(process: subprocess.Popen[bytes], stage: str, timeout_s: float) -> bool:
    """Wait for the process; True if it ran out of time."""
    started = time.monotonic()
    while (left_s := started + timeout_s - time.monotonic()) > 0:
        try:
            process.wait(min(_HEARTBEAT_S, left_s))
            return False
        except subprocess.TimeoutExpired:
            log.info("%s: still running after %.0f s", stage, time.monotonic() - started)
    return True


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """End the leader of a group (`start_new_session`) and all that it started.

    The rest is killed before the leader is reaped: until then no other group has its number.
    """
    deadline = time.monotonic() + _GRACE_S
    with contextlib.suppress(ProcessLookupError):
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGTERM)
            ended_unreaped = os.WEXITED | os.WNOHANG | os.WNOWAIT
            while os.waitid(os.P_PID, process.pid, ended_unreaped) is None:
                if time.monotonic() > deadline:
                    break
                time.sleep(_POLL_S)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_lines(path: Path, count: int = _LAST_LINES) -> tuple[str, ...]:
    """The last `count` lines of a log, undecodable bytes replaced."""
    with path.open(encoding="utf-8", errors="replace") as stream:
        return tuple(line.rstrip() for line in deque(stream, maxlen=count))
