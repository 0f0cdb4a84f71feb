"""Real servers for tests: started, waited for, ended. What is missing fails, nothing is skipped."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest


@contextlib.contextmanager
def running(
    command: Sequence[str],
    folder: Path,
    ready: Callable[[], bool],
    *,
    start_s: float,
    stop_s: float = 10.0,
    environ: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server in a process group of its own, which is gone after the block.

    Args:
        command: Its first word names it in messages.
        folder: Where it works and its log lies; the caller's.
        ready: Whether it answers; an OSError means no.
        start_s: How long that may take.
        stop_s: How long it has after SIGTERM.
        environ: All its environment; None for ours.
    """
    log = folder / "server.log"
    with log.open("ab") as stream:
        process = subprocess.Popen(
            command, cwd=folder, env=environ, stdin=subprocess.DEVNULL, stdout=stream,
            stderr=stream, start_new_session=True,
        )  # fmt: skip
    try:
        end = time.monotonic() + start_s
        while process.poll() is None and time.monotonic() < end:
            with contextlib.suppress(OSError):
                if ready():
                    break
            time.sleep(0.05)
        else:
            lines = log.read_text(errors="replace").splitlines()[-40:]
            fault = f"{command[0]} did not start; the end of its log:"
            pytest.fail("\n".join([fault, *lines]))
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=stop_s)
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port() -> int:
    """A port of the loopback address that nothing uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
