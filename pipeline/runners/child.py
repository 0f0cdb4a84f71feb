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
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pipeline
from pipeline.core import errors
from pipeline.core.errors import CorruptError, Fault, PipelineError, RecipeError, ToolError
from pipeline.core.process import Started, child_environ, kill_group, last_lines
from pipeline.runners.children import main as protocol
from pipeline.runners.runner import (
    UNUSED_TOKEN,
    Generation,
    RequestTiming,
    require_fit,
    require_possible,
)
from pipeline.runners.workload import BatchOptions

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CHILDREN = Path(protocol.__file__).parent
"""The folder of what runs in a child; a container needs nothing else of this package."""

_FULL_CARD = ("CUDA out of memory", "OutOfMemoryError", "CUDA error: out of memory")
"""How PyTorch writes that a card is full; vLLM's own process says so in its log only."""
_SLICE_S = 0.2
"""How often a dead process is noticed whose pipe something else still holds open."""
_END_S = 20.0
"""For vLLM's engine to end by itself."""
_CHUNK_BYTES = 1 << 20
_MOST_NOISE_BYTES = 1 << 20
"""Of text before the first frame, such as an image's greeting, which goes to the log."""


# -P keeps folders where a module could be taken for another one off the child's path.
_OWN_INTERPRETER = Started(command=(sys.executable, "-P", str(CHILDREN / "main.py")))


@dataclass(frozen=True, kw_only=True)
class Program:
    """What a child process loads: `model`, `arguments` and `paths` as of `children.main`.

    `name` is the runtime's, for messages. Leaving the context of `start` removes what was made.
    After `load_s`, compilation included, or `answer_s` without an answer or the next token of a
    stream the process is stopped.
    """

    name: str
    model: str
    arguments: Mapping[str, Any]
    load_s: float
    answer_s: float
    paths: tuple[str, ...] = ()
    start: Callable[[], AbstractContextManager[Started]] = field(
        default=lambda: contextlib.nullcontext(_OWN_INTERPRETER)
    )


class ChildSession:
    """`pipeline.runners.runner.Session`; the model is in the other process.

    Every method also raises `ToolError` when that ended, hangs or writes nonsense: the session is
    then of no more use.
    """

    def __init__(self, process: subprocess.Popen[bytes], log_path: Path, program: Program) -> None:
        self.log_path = log_path
        self._answer_s = program.answer_s
        self._name = program.name
        self._process = process
        self._buffer = bytearray()
        self._in_step = False
        arguments = dict(program.arguments)
        self._send("load", model=program.model, paths=program.paths, arguments=arguments)
        self.context: int | None = self._receive(program.load_s, "load")[0]["context"]

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        import numpy as np

        require_fit([tokens], 0, self.context)
        self._send("logits", tokens=list(tokens))
        answer, data = self._receive()
        rows, vocab = answer["shape"]
        values = np.frombuffer(data, answer["dtype"]).reshape(rows, vocab)
        if rows != len(tokens):
            got = f"wanted logits of {len(tokens)} positions, got {rows}; see {self.log_path}"
            raise PipelineError(f"{self._name}: {got}")
        finite = np.isfinite(values).all(axis=1)
        if not finite.all():
            raise CorruptError(
                f"{self._name} gave logits that are not finite at {int((~finite).sum())} of {rows} "
                "positions; the engine cannot be judged: check the calibration's outliers and "
                f"quantizer.keep_16bit; see {self.log_path}"
            )
        return values

    def generate(
        self, prompts: Sequence[Sequence[int]], osl: int, options: BatchOptions | None = None
    ) -> Generation:
        import numpy as np

        require_fit(prompts, osl, self.context)
        asked = None if options is None else asdict(options)
        self._send("generate", prompts=[list(one) for one in prompts], osl=osl, options=asked)
        # The last request cannot be answered before it arrives.
        arriving_s = max(options.arrivals_s, default=0.0) if options else 0.0
        answer, _ = self._receive(self._answer_s + arriving_s)
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
        asked = {"max_new_tokens": max_new_tokens, "eos_token_ids": sorted(eos_token_ids)}
        self._send("stream", prompt=list(prompt), **asked)
        try:
            while (message := self._receive()[0])["kind"] == "token":
                yield int(message["token"])
        except GeneratorExit:  # the caller wants no more: the next answer must not be this stream's
            self._send("cancel")
            with contextlib.suppress(PipelineError):
                while self._receive()[0]["kind"] == "token":
                    pass
            raise

    def end(self) -> None:
        with contextlib.suppress(ToolError):
            self._send("end")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        kill_group(self._process)

    def _send(self, kind: str, **values: Any) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(protocol.pack({"kind": kind, **values}))
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None

    def _receive(
        self, timeout_s: float | None = None, setting: str = "answer"
    ) -> tuple[dict[str, Any], bytes]:
        """The next message, and the raw bytes of its array; an error in the class that it had.

        `setting` says which setting of the runner the limit is; None is that of an answer.
        """
        limit_s = self._answer_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + limit_s
        while (frame := self._next_frame()) is None:
            if not self._fill() and time.monotonic() > deadline:
                raise self._failure(
                    f"it did not answer for {limit_s:.0f} s and was stopped; if it only needs "
                    f"longer, raise runner.{setting}_timeout_s"
                )
        if frame[0]["kind"] == "error":
            raise self._error_of(frame[0])
        return frame

    def _next_frame(self) -> tuple[dict[str, Any], bytes] | None:
        """Cut the first frame off what has come; None while it is not whole."""
        buffer, header = self._buffer, protocol.HEADER
        if not self._in_step:
            start = buffer.find(protocol.MAGIC)
            if start < 0 and len(buffer) <= _MOST_NOISE_BYTES:
                return None
            with self.log_path.open("ab") as stream:
                stream.write(buffer[: max(start, 0)])
            del buffer[: max(start, 0)]
            self._in_step = True
        if len(buffer) < header.size:
            return None
        magic, text_size, data_size = header.unpack_from(buffer)
        if magic != protocol.MAGIC:
            raise self._failure(
                f"it wrote {magic!r} where a frame begins: a library writes to the pipe of the "
                "frames; see the log and report it"
            )
        text_end = header.size + text_size
        if len(buffer) < text_end + data_size:
            return None
        message: dict[str, Any] = json.loads(buffer[header.size : text_end])
        data = bytes(buffer[text_end : text_end + data_size])
        del buffer[: text_end + data_size]
        return message, data

    def _fill(self) -> bool:
        """Take what has come, or wait a little; whether something came."""
        stream = self._process.stdout
        assert stream is not None
        with selectors.DefaultSelector() as selector:
            selector.register(stream, selectors.EVENT_READ)
            ready = selector.select(_SLICE_S)
        data = os.read(stream.fileno(), _CHUNK_BYTES) if ready else b""
        self._buffer += data
        if not data and (ready or self._process.poll() is not None):
            raise self._failure()
        return bool(data)

    def _error_of(self, message: Mapping[str, Any]) -> PipelineError:
        text, code = str(message["message"]), str(message["code"])
        lines = "\n".join((text, *last_lines(self.log_path)))
        if code == "PipelineError" and any(words in lines for words in _FULL_CARD):
            code = "OutOfMemoryError"
        if code == "OutOfMemoryError":
            text += "; free the card, take a smaller batch or context, or one with more memory"
        text = f"{self._name} failed: {text}; see {self.log_path}"
        if code == "RecipeError":
            return RecipeError([Fault("", text)])
        made: type[PipelineError] = getattr(errors, code)
        return made(text)

    def _failure(self, hint: str = "") -> ToolError:
        """End a process that ended, hangs or writes nonsense; what is known of it."""
        if not hint:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_S)
        kill_group(self._process)
        arguments = self._process.args
        assert isinstance(arguments, list)
        return ToolError(
            stage=f"runner {self._name.lower()}",
            command=[str(part) for part in arguments],
            returncode=self._process.returncode,
            log_path=self.log_path,
            last_lines=last_lines(self.log_path),
            hint=hint,
        )


@contextlib.contextmanager
def open_child(program: Program) -> Iterator[ChildSession]:
    """Start a program and let it load; leaving the context ends its process, and so its memory.

    Its log, in the system's temporary folder, stays when it failed. PipelineError if it cannot
    load, a `ToolError` if it ended, hangs or writes nonsense.
    """
    prefix = f"enginesmith-{program.name.lower()}-"
    with tempfile.NamedTemporaryFile("ab", prefix=prefix, suffix=".log", delete=False) as log:
        log_path = Path(log.name)
        try:
            with program.start() as started, _start_process(started, log) as process:
                session = ChildSession(process, log_path, program)
                yield session
                session.end()
        except PipelineError:
            raise  # its message names the log
        except BaseException:
            log_path.unlink()
            raise
    log_path.unlink()


@contextlib.contextmanager
def _start_process(started: Started, log: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    command = list(started.command)
    log.write(f"$ {command!r}\n".encode())
    log.flush()
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env=child_environ(started.env),
        start_new_session=True,
    )
    try:
        yield process
    finally:
        kill_group(process)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def session_program(
    name: str, opener: str, *, load_s: float, answer_s: float, **arguments: Any
) -> Program:
    """A session of this package; `opener` is `module:function`, which gives its context manager."""
    return Program(
        name=name,
        model=__file__,
        arguments={"opener": opener, **arguments},
        load_s=load_s,
        answer_s=answer_s,
        paths=(str(Path(pipeline.__file__).parents[1]),),
    )


def load(opener: str, **arguments: Any) -> SessionModel:
    """In the child: what `session_program` says."""
    module, _, function = opener.partition(":")
    return SessionModel(getattr(import_module(module), function)(**arguments))


class SessionModel:
    """A model for `pipeline.runners.children.main` on a `pipeline.runners.runner.Session`."""

    def __init__(self, opened: AbstractContextManager[Any]) -> None:
        self._opened = opened
        self._session = opened.__enter__()
        self.context: int | None = getattr(self._session, "context", None)
        self.logits = self._session.logits

    def generate(
        self, prompts: Sequence[Sequence[int]], osl: int, options: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        asked = None if options is None else BatchOptions(**options)
        made = self._session.generate(prompts, osl, asked)
        rows = zip(made.tokens.tolist(), made.output_lengths, strict=True)
        return {
            "tokens": [row[:length] for row, length in rows],
            "ttft_s": made.ttft_s,
            "total_s": made.total_s,
            "requests": [asdict(request) for request in made.requests],
        }

    def stream(
        self, prompt: Sequence[int], max_new_tokens: int, eos_token_ids: Sequence[int]
    ) -> Generator[int, None, None]:
        yield from self._session.stream(prompt, max_new_tokens, frozenset(eos_token_ids))

    def close(self) -> None:
        self._opened.__exit__(None, None, None)
