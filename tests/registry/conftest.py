"""What the tests of all parts of the registry share; packages are in `packages`."""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Callable, Sequence

import pytest

from pipeline.core.errors import PipelineError

InChildren = Callable[[Sequence[Callable[[], object]]], list[int]]


@pytest.fixture
def in_children() -> InChildren:
    """Run functions at the same moment, each in a process of its own.

    Returns what each process ended with: 0, the exit code of its error, or minus its signal.
    """

    def run(jobs: Sequence[Callable[[], object]]) -> list[int]:
        start_read, start_write = os.pipe()
        pids = []
        for job in jobs:
            pid = os.fork()
            if pid == 0:
                code = 99
                try:
                    logging.disable()
                    os.close(start_write)
                    os.read(start_read, 1)  # returns when the parent closes its end
                    job()
                    code = 0
                except PipelineError as error:
                    code = error.exit_code
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(code)
            pids.append(pid)
        os.close(start_read)
        os.close(start_write)
        return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]

    return run
