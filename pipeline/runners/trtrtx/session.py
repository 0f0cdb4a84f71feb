"""A session on an engine that another process holds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from pipeline.runners.child_session import ChildSession, module_program, ready_child
from pipeline.runners.vllm.process import Program
from pipeline.runners.vllm.session import Timeouts

_NAME = "TensorRT-RTX"


class RtxSession(ChildSession):
    """`pipeline.runners.session.Session` on `pipeline.runners.trtrtx.child`."""


def engine_program() -> Program:
    """What starts `pipeline.runners.trtrtx.child`."""
    return module_program(_NAME, "pipeline.runners.trtrtx.child")


@contextlib.contextmanager
def open_session(
    arguments: Sequence[str], timeouts: Timeouts, program: Program
) -> Iterator[RtxSession]:
    """Load an engine; leaving the context ends the process that holds it.

    Args:
        arguments: Of `pipeline.runners.trtrtx.child`.
        timeouts: How long to wait.
        program: What is started.

    Raises:
        ToolError: The process ended or hangs.
        IncompatibleError: The engine is not for this card.
        CorruptError: It is no decoder engine of this pipeline.
    """
    with ready_child(arguments, timeouts, program) as child:
        yield RtxSession(child, timeouts, _NAME)
