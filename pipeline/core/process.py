"""The one place that starts another program.

The command is a list, never a shell string. Its standard output and error go to one log file as
they come, so that what a tool wrote before it died is kept; a line now and then says that it is
still at work. On Ctrl-C, a timeout or any other exception the whole process group is killed. When
this process itself is killed, the kernel kills the program (`pipeline.core.launch`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.core import launch
from pipeline.core.errors import ToolError

log = logging.getLogger(__name__)

_POLL_S = 0.05
_GRACE_S = 3.0
_LAST_LINES = 30
_LAUNCH = (sys.executable, "-I", "-S", launch.__file__)


def run_tool(
    command: Sequence[str],
    *,
    stage: str,
    log_path: Path,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 24 * 3600.0,
    heartbeat_s: float = 15.0,
) -> None:
    """Run `command` to its end; its output is appended to `log_path`.

    Args:
        command: Program and arguments.
        stage: Names the work in messages.
        log_path: Gets the command line, then everything that the program prints.
        env: Variables set in addition to the current ones.
        timeout_s: After this long it is killed.
        heartbeat_s: How often a line says that it still runs.

    Raises:
        ToolError: It could not start, exited non-zero, was killed by a signal, or ran out of time.
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
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
        try:
            timed_out = _wait(process, stage, timeout_s, heartbeat_s)
        finally:
            _kill_group(process)
    if timed_out or process.returncode != 0:
        raise ToolError(
            stage=stage,
            command=command,
            returncode=process.returncode,
            log_path=log_path,
            last_lines=last_lines(log_path),
            hint=f"it was stopped after {timeout_s:.0f} s" if timed_out else "",
        )


def _wait(
    process: subprocess.Popen[bytes], stage: str, timeout_s: float, heartbeat_s: float
) -> bool:
    """Wait for the process; True if it ran out of time."""
    started = time.monotonic()
    next_beat = started + heartbeat_s
    while process.poll() is None:
        now = time.monotonic()
        if now - started > timeout_s:
            return True
        if now >= next_beat:
            log.info("%s: still running after %.0f s", stage, now - started)
            next_beat = now + heartbeat_s
        time.sleep(_POLL_S)
    return False


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """End the process and all that it started; harmless when they ended by themselves."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_GRACE_S)
            return


def last_lines(path: Path, count: int = _LAST_LINES) -> tuple[str, ...]:
    """The last `count` lines of a log, undecodable bytes replaced."""
    with path.open(encoding="utf-8", errors="replace") as stream:
        return tuple(line.rstrip() for line in deque(stream, maxlen=count))
