"""A session on a model that another process holds; it speaks as `pipeline.runners.vllm.child`."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pipeline
from pipeline.core.errors import (
    CorruptError,
    Fault,
    IncompatibleError,
    PipelineError,
    RecipeError,
)
from pipeline.runners.session import Demands, Generation
from pipeline.runners.vllm.process import (
    Child,
    Program,
    generate_request,
    running_child,
    stream_tokens,
)
from pipeline.runners.vllm.session import Timeouts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_LOAD, _ANSWER = "runner.load_timeout_s", "runner.answer_timeout_s"
_ERRORS: Mapping[str, Callable[[str], PipelineError]] = {
    "CorruptError": CorruptError,
    "IncompatibleError": IncompatibleError,
    "RecipeError": lambda message: RecipeError([Fault("", message)]),
}
"""Classes that an error of the other process keeps on its way here, for their exit codes."""


class ChildSession:
    """`pipeline.runners.session.Session`; the decode loop itself runs in the other process.

    Every method raises `ToolError` when that process ended or hangs, `RecipeError` for prompts
    that the engine does not take, and `CorruptError` for logits that are not finite.
    """

    def __init__(self, child: Child, timeouts: Timeouts, name: str) -> None:
        """Speak with a child that is ready; `name` of the runtime is for messages."""
        self._child = child
        self._answer_s = timeouts.answer_s
        self._name = name

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        import numpy as np

        self._child.send({"kind": "logits", "tokens": list(tokens)})
        answer = self._receive()
        data = self._child.receive_bytes(answer["size_bytes"], self._answer_s, _ANSWER)
        values = np.frombuffer(data, "<f4").reshape(answer["shape"])
        finite = np.isfinite(values).all(axis=1)
        if not finite.all():
            raise CorruptError(
                f"{self._name} gave logits that are not finite at {int((~finite).sum())} of "
                f"{len(values)} positions; the engine cannot be judged: check the calibration's "
                f"outliers and quantizer.keep_16bit; see {self._child.log_path}"
            )
        return values

    def generate(
        self, prompts: Sequence[Sequence[int]], osl: int, demands: Demands | None = None
    ) -> Generation:
        import numpy as np

        self._child.send(generate_request(prompts, osl, demands))
        answer = self._receive()
        tokens = np.array(answer["tokens"], np.int64)
        lengths = answer["lengths"]
        # A batch whose rows have all ended before `osl` is as long as its longest row.
        longest = osl if lengths is None else max(lengths)
        if tokens.shape != (len(prompts), longest):
            raise PipelineError(
                f"asked the engine for {len(prompts)} x {osl} tokens, got {tokens.shape}: the "
                "longest prompt and osl must fit compiler.max_seq_len together"
            )
        return Generation(
            tokens=tokens,
            ttft_s=float(answer["ttft_s"]),
            total_s=float(answer["total_s"]),
            lengths=None if lengths is None else tuple(lengths),
        )

    def stream(
        self, prompt: Sequence[int], max_new_tokens: int, eos_token_ids: frozenset[int]
    ) -> Iterator[int]:
        return stream_tokens(self._child, self._receive, prompt, max_new_tokens, eos_token_ids)

    def _receive(self) -> dict[str, Any]:
        return receive(self._child, self._answer_s, _ANSWER, self._name)


def module_program(name: str, module: str) -> Program:
    """What starts a module of this package in a process of its own.

    Args:
        name: Of the runtime, for messages.
        module: Its dotted name.
    """
    # -P keeps the current folder, where one could be taken for a package, off its path; so it is
    # told where this package is.
    home = str(Path(pipeline.__file__).parents[1])
    paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
    return Program(
        name=name,
        command=(sys.executable, "-P", "-m", module),
        env={"PYTHONPATH": os.pathsep.join(paths)},
    )


def receive(child: Child, timeout_s: float, setting: str, name: str) -> dict[str, Any]:
    """The next message; an error of the other process in the class that it had there."""
    try:
        return child.receive(timeout_s, setting)
    except PipelineError as error:
        # How `Child.receive` tells an error of the other process.
        failed = rf"{name} failed: ({'|'.join(_ERRORS)}): (.*)"
        if told := re.fullmatch(failed, str(error), re.DOTALL):
            raise _ERRORS[told[1]](told[2]) from None
        raise


@contextlib.contextmanager
def ready_child(arguments: Sequence[str], timeouts: Timeouts, program: Program) -> Iterator[Child]:
    """Start a program and wait until it has loaded; leaving the context ends its process.

    Args:
        arguments: Of the program.
        timeouts: How long to wait.
        program: What is started.

    Raises:
        ToolError: The process ended or hangs.
        PipelineError: It says that it cannot load.
    """
    with running_child(arguments, program=program) as child:
        receive(child, timeouts.load_s, _LOAD, program.name)
        yield child
