"""Runs a program that does not outlive the process that started it, however that one ends.

    python -I -S launch.py PARENT_PID PROGRAM ARGUMENT...

It asks the kernel to be killed when its parent ends, and becomes the program: the request stays in
force (prctl(2), PR_SET_PDEATHSIG). Only a child can ask that, and no Python code is safe between
fork and exec in a parent with threads. What the program starts itself is not covered. Elsewhere
than on Linux the program runs all the same, and may stay behind.

Imports nothing of ours, so that it starts in milliseconds and with any `sys.path`.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

_PR_SET_PDEATHSIG = 1
"""<linux/prctl.h>"""


def main(parent: int, command: list[str]) -> NoReturn:
    """Become the program; the kernel kills it when the thread ends that started it."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(128 + signal.SIGKILL)
    for name in ("SIGPIPE", "SIGXFSZ"):  # Python ignores these, and exec would hand that on
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"cannot start {command[0]}: {error.strerror}")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
