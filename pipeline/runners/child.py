"""A session on a model that another process holds: how that is started, spoken with and ended."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pipeline
from pipeline.core.errors import (
    CorruptError,
    Fault,
    IncompatibleError,
    OutOfMemoryError,
    PipelineError,
    RecipeError,
    ToolError,
    TransientError,
)
from pipeline.core.process import Started, kill_group, last_lines
from pipeline.runners.children import main as protocol
from pipeline.runners.session import (
    UNUSED_TOKEN,
    BatchOptions,
    Generation,
    RequestTiming,
    require_fit,
    require_possible,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CHILDREN = Path(protocol.__file__).parent
"""The folder of what runs in a child; a container needs nothing else of this package."""

_ERRORS: Mapping[str, Callable[[str], PipelineError]] = {
    "CorruptError": CorruptError,
    "IncompatibleError": IncompatibleError,
    "OutOfMemoryError": OutOfMemoryError,
    "RecipeError": lambda message: RecipeError([Fault("", message)]),
    "TransientError": TransientError,
}
_FULL_CARD = ("CUDA out of memory", "OutOfMemoryError", "CUDA error: out of memory")
"""How PyTorch writes that a card is full; vLLM's own process says so in its log only."""
_SLICE_S = 0.2
"""How often a dead process is noticed whose pipe something else still holds open."""
_END_S = 20.0
"""vLLM's engine gets so long to end by itself."""
_CHUNK_BYTES = 1 << 20
_MOST_NOISE_BYTES = 1 << 20
"""Text before the first frame, such as the greeting of an image, goes to the log, up to this."""
_LOAD, _ANSWER = "runner.load_timeout_s", "runner.answer_timeout_s"


@dataclass(frozen=True, kw_only=True)
class Timeouts:
    """After so long without an answer the process is stopped.

    Attributes:
        load_s: For loading, compilation included.
        answer_s: For an answer, or the next token of a stream.
    """

    load_s: float
    answer_s: float


# -P keeps folders where a module could be taken for another one off the child's path.
OWN_INTERPRETER = Started(command=(sys.executable, "-P", str(CHILDREN / "main.py")))


@dataclass(frozen=True, kw_only=True)
class Program:
    """What a child process loads.

    Attributes:
        name: Of the runtime, for messages.
        model: Path of the file whose `load` gives the model, as the child sees it.
        arguments: Of `load`, as JSON has them.
        paths: Go to the front of the child's `sys.path`.
        start: Gives the command; leaving its context removes what was made for it.
    """

    name: str
    model: str
    arguments: Mapping[str, Any]
    paths: tuple[str, ...] = ()
    start: Callable[[], AbstractContextManager[Started]] = field(
        default=lambda: contextlib.nullcontext(OWN_INTERPRETER)
    )


def session_program(name: str, opener: str, **arguments: Any) -> Program:
    """A program that holds a session of this package, under this interpreter.

    Args:
        name: Of the runtime, for messages.
        opener: `module:function`, which gives a context manager of a session.
        arguments: Of the function, as JSON has them.
    """
    return Program(
        name=name,
        model=str(CHILDREN / "session_model.py"),
        arguments={"opener": opener, **arguments},
        paths=(str(Path(pipeline.__file__).parents[1]),),
    )


class ChildProcess:
    """A running child, and the frames to and from it.

    After any error but that of a single request it is of no more use.
    """

    def __init__(self, process: subprocess.Popen[bytes], log_path: Path, name: str) -> None:
        self.name = name
        self.log_path = log_path
        self._process = process
        self._buffer = bytearray()
        self._in_step = False

    def send(self, message: Mapping[str, Any]) -> None:
        """Hand over one request.

        Raises:
            ToolError: The process has ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(protocol.pack(dict(message)))
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure("") from None

    def receive(self, timeout_s: float, setting: str) -> tuple[dict[str, Any], bytes]:
        """The next message, and the raw bytes of its array.

        Args:
            timeout_s: Longest time to wait for it.
            setting: Config path of that time, for the message.

        Raises:
            ToolError: The process ended, did not answer in time, or wrote something else.
            PipelineError: It reports that the request failed, in the class that the error had.
        """
        deadline = time.monotonic() + timeout_s
        header = protocol.HEADER

        def take(size: int) -> bytes:
            while len(self._buffer) < size:
                self._fill(deadline, timeout_s, setting)
            data = bytes(self._buffer[:size])
            del self._buffer[:size]
            return data

        while not self._skip_noise():
            self._fill(deadline, timeout_s, setting)
        magic, text_size, data_size = header.unpack(take(header.size))
        if magic != protocol.MAGIC:
            raise self._failure(
                f"it wrote {magic!r} where a frame begins: a library writes to the pipe of the "
                "frames; see the log and report it"
            )
        message: dict[str, Any] = json.loads(take(text_size))
        data = take(data_size)
        if message["kind"] == "error":
            raise self._reported(message)
        return message, data

    def _skip_noise(self) -> bool:
        """Drop what comes before the first frame; whether that has begun."""
        if self._in_step:
            return True
        start = self._buffer.find(protocol.MAGIC)
        if start < 0 and len(self._buffer) <= _MOST_NOISE_BYTES:
            return False
        noise = bytes(self._buffer[: max(start, 0)])
        if noise:
            with self.log_path.open("ab") as stream:
                stream.write(noise)
            del self._buffer[: len(noise)]
        self._in_step = True
        return True

    def _fill(self, deadline: float, timeout_s: float, setting: str) -> None:
        """Take what has come, or wait a little."""
        stream = self._process.stdout
        assert stream is not None
        with selectors.DefaultSelector() as selector:
            selector.register(stream, selectors.EVENT_READ)
            ready = selector.select(_SLICE_S)
        if ready:
            data = os.read(stream.fileno(), _CHUNK_BYTES)
            self._buffer += data
            if data:
                return
        if ready or self._process.poll() is not None:
            raise self._failure("")
        if time.monotonic() > deadline:
            raise self._failure(
                f"it did not answer for {timeout_s:.0f} s and was stopped; if it only needs "
                f"longer, raise {setting}"
            )

    def _reported(self, message: Mapping[str, Any]) -> PipelineError:
        """The error of a request in the class that it had in the child."""
        text, code = str(message["message"]), str(message["code"])
        lines = "\n".join((text, *last_lines(self.log_path)))
        if code not in _ERRORS and any(words in lines for words in _FULL_CARD):
            code = "OutOfMemoryError"
        if code == "OutOfMemoryError":
            text += "; free the card, take a smaller batch or context, or one with more memory"
        make = _ERRORS.get(code, PipelineError)
        return make(f"{self.name} failed: {text}; see {self.log_path}")

    def _failure(self, hint: str) -> ToolError:
        """What is known of a process that ended, hangs or writes nonsense; it is ended."""
        if not hint:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_S)
        kill_group(self._process)
        arguments = self._process.args
        assert isinstance(arguments, list)
        return ToolError(
            stage=f"runner {self.name.lower()}",
            command=[str(part) for part in arguments],
            returncode=self._process.returncode,
            log_path=self.log_path,
            last_lines=last_lines(self.log_path),
            hint=hint,
        )

    def end(self) -> None:
        """Let it end by itself, and end what is left of it."""
        with contextlib.suppress(ToolError):
            self.send({"kind": "end"})
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        kill_group(self._process)


class ChildSession:
    """`pipeline.runners.session.Session`; the model is in the other process.

    Every method also raises `ToolError` when that process ended, hangs or writes nonsense.
    """

    def __init__(self, child: ChildProcess, answer_s: float, context: int | None) -> None:
        """Speak with a child that is ready; `context` as in `children.main.Model`."""
        self._child = child
        self._answer_s = answer_s
        self.context = context

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        import numpy as np

        require_fit([tokens], 0, self.context)
        self._child.send({"kind": "logits", "tokens": list(tokens)})
        answer, data = self._receive()
        rows, vocab = answer["shape"]
        values = np.frombuffer(data, answer["dtype"]).reshape(rows, vocab)
        name, log_path = self._child.name, self._child.log_path
        if rows != len(tokens):
            raise PipelineError(
                f"asked {name} for the logits of {len(tokens)} positions, got {rows}; "
                f"see {log_path}"
            )
        finite = np.isfinite(values).all(axis=1)
        if not finite.all():
            raise CorruptError(
                f"{name} gave logits that are not finite at {int((~finite).sum())} of {rows} "
                "positions; the engine cannot be judged: check the calibration's outliers and "
                f"quantizer.keep_16bit; see {log_path}"
            )
        return values

    def generate(
        self, prompts: Sequence[Sequence[int]], osl: int, options: BatchOptions | None = None
    ) -> Generation:
        import numpy as np

        require_fit(prompts, osl, self.context)
        self._child.send(
            {
                "kind": "generate",
                "prompts": [list(prompt) for prompt in prompts],
                "osl": osl,
                "options": None if options is None else asdict(options),
            }
        )
        # The last request cannot be answered before it arrives.
        arriving_s = max(options.arrivals_s, default=0.0) if options else 0.0
        answer, _ = self._receive(arriving_s)
        rows: list[list[int]] = answer["tokens"]
        tokens = np.full((len(rows), max(map(len, rows), default=0)), UNUSED_TOKEN, np.int64)
        for target, row in zip(tokens, rows, strict=True):
            target[: len(row)] = row
        lengths = tuple(map(len, rows))
        made = Generation(
            tokens=tokens,
            ttft_s=float(answer["ttft_s"]),
            total_s=float(answer["total_s"]),
            lengths=None if options is None and len(set(lengths)) == 1 else lengths,
            requests=tuple(RequestTiming(**found) for found in answer.get("requests", ())),
        )
        require_possible(made, prompts, osl, options)
        return made

    def stream(
        self, prompt: Sequence[int], max_new_tokens: int, eos_token_ids: frozenset[int]
    ) -> Iterator[int]:
        require_fit([prompt], 1, self.context)
        self._child.send(
            {
                "kind": "stream",
                "prompt": list(prompt),
                "max_new_tokens": max_new_tokens,
                "eos_token_ids": sorted(eos_token_ids),
            }
        )
        ended = False
        try:
            while (message := self._receive()[0])["kind"] == "token":
                yield int(message["token"])
            ended = True
        except PipelineError:
            ended = True
            raise
        finally:
            if not ended:  # the caller wants no more: the next answer must not be this stream's
                self._child.send({"kind": "cancel"})
                with contextlib.suppress(PipelineError):
                    while self._receive()[0]["kind"] == "token":
                        pass

    def clear_cache(self) -> None:
        """Give back what the allocator of the child keeps; only of a model that has one."""
        self._child.send({"kind": "clear_cache"})
        self._receive()

    def _receive(self, more_s: float = 0.0) -> tuple[dict[str, Any], bytes]:
        return self._child.receive(self._answer_s + more_s, _ANSWER)


@contextlib.contextmanager
def open_child(program: Program, timeouts: Timeouts) -> Iterator[ChildSession]:
    """Start a program and let it load; leaving the context ends its process, and so its memory.

    Its log is a file in the system's temporary folder, which stays when it failed.

    Raises:
        ToolError: The process ended, hangs or writes nonsense.
        PipelineError: It reports that it cannot load.
    """
    prefix = f"enginesmith-{program.name.lower()}-"
    descriptor, path = tempfile.mkstemp(prefix=prefix, suffix=".log")
    os.close(descriptor)
    log_path = Path(path)
    try:
        with program.start() as started, _running(started, log_path, program.name) as child:
            child.send(
                {
                    "kind": "load",
                    "model": program.model,
                    "paths": list(program.paths),
                    "arguments": dict(program.arguments),
                }
            )
            ready, _ = child.receive(timeouts.load_s, _LOAD)
            yield ChildSession(child, timeouts.answer_s, ready["context"])
    except PipelineError:
        raise  # its message names the log
    except BaseException:
        log_path.unlink()
        raise
    log_path.unlink()


@contextlib.contextmanager
def _running(started: Started, log_path: Path, name: str) -> Iterator[ChildProcess]:
    """A process whose standard error is the log; ended with all that it started."""
    command = list(started.command)
    log_path.write_text(f"$ {command!r}\n")
    with log_path.open("ab") as stream:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stream,
            env={**os.environ, **started.env},
            start_new_session=True,
        )
    try:
        child = ChildProcess(process, log_path, name)
        yield child
        child.end()
    finally:
        kill_group(process)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
