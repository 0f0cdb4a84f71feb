"""A session on an engine that another process holds."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pipeline
from pipeline.errors import (
    CorruptError,
    Fault,
    IncompatibleError,
    PipelineError,
    RecipeError,
)
from pipeline.runners.session import Generation
from pipeline.runners.vllm.process import Child, Program, running_child, stream_tokens
from pipeline.runners.vllm.session import Timeouts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_LOAD, _ANSWER = "runner.load_timeout_s", "runner.answer_timeout_s"
_NAME = "TensorRT-RTX"
_ERRORS: Mapping[str, Callable[[str], PipelineError]] = {
    "CorruptError": CorruptError,
    "IncompatibleError": IncompatibleError,
    "RecipeError": lambda message: RecipeError([Fault("", message)]),
}
"""Classes that an error of the other process keeps on its way here, for their exit codes."""
_FAILED = re.compile(rf"{_NAME} failed: ({'|'.join(_ERRORS)}): (.*)", re.DOTALL)
"""How `Child.receive` tells an error of the other process."""


class RtxSession:
    """`pipeline.runners.session.Session`; the decode loop itself runs in the other process.

    Every method raises `ToolError` when that process ended or hangs, `RecipeError` for prompts
    that the engine does not take, and `CorruptError` for logits that are not finite.
    """

    def __init__(self, child: Child, timeouts: Timeouts) -> None:
        self._child = child
        self._answer_s = timeouts.answer_s

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        import numpy as np

        self._child.send({"kind": "logits", "tokens": list(tokens)})
        answer = self._receive()
        data = self._child.receive_bytes(answer["size_bytes"], self._answer_s, _ANSWER)
        values = np.frombuffer(data, "<f4").reshape(answer["shape"])
        finite = np.isfinite(values).all(axis=1)
        if not finite.all():
            raise CorruptError(
                f"TensorRT-RTX gave logits that are not finite at {int((~finite).sum())} of "
                f"{len(values)} positions; the engine cannot be judged: check the calibration's "
                f"outliers and quantizer.keep_16bit; see {self._child.log_path}"
            )
        return values

    def generate(self, prompts: Sequence[Sequence[int]], osl: int) -> Generation:
        import numpy as np

        request = {"kind": "generate", "prompts": [list(p) for p in prompts], "osl": osl}
        self._child.send(request)
        answer = self._receive()
        tokens = np.array(answer["tokens"], np.int64)
        if tokens.shape != (len(prompts), osl):
            raise PipelineError(
                f"asked the engine for {len(prompts)} x {osl} tokens, got {tokens.shape}: the "
                "longest prompt and osl must fit compiler.max_seq_len together"
            )
        return Generation(
            tokens=tokens, ttft_s=float(answer["ttft_s"]), total_s=float(answer["total_s"])
        )

    def stream(
        self, prompt: Sequence[int], max_new_tokens: int, eos_token_ids: frozenset[int]
    ) -> Iterator[int]:
        return stream_tokens(self._child, self._receive, prompt, max_new_tokens, eos_token_ids)

    def _receive(self) -> dict[str, Any]:
        return _receive(self._child, self._answer_s, _ANSWER)


def engine_program() -> Program:
    """What starts `pipeline.runners.trtrtx.child`."""
    # -P keeps the current folder, where one could be taken for a package, off its path; so it is
    # told where this package is.
    home = str(Path(pipeline.__file__).parents[1])
    paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
    return Program(
        name=_NAME,
        command=(sys.executable, "-P", "-m", "pipeline.runners.trtrtx.child"),
        env={"PYTHONPATH": os.pathsep.join(paths)},
    )


def _receive(child: Child, timeout_s: float, setting: str) -> dict[str, Any]:
    """The next message; an error of the other process in the class that it had there."""
    try:
        return child.receive(timeout_s, setting)
    except PipelineError as error:
        if told := _FAILED.fullmatch(str(error)):
            raise _ERRORS[told[1]](told[2]) from None
        raise


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
    with running_child(arguments, program=program) as child:
        _receive(child, timeouts.load_s, _LOAD)
        yield RtxSession(child, timeouts)
