"""The process that holds the model: started, spoken with against a clock, and ended."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.core.errors import PipelineError, ToolError
from pipeline.core.process import last_lines
from pipeline.runners.session import Demands
from pipeline.runners.vllm import child

_SLICE_S = 0.2
"""How often a dead process is noticed whose pipe something else still holds open."""
_END_S = 20.0
"""vLLM's engine gets so long to end by itself."""
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Program:
    """What is started.

    Attributes:
        name: Of the runtime, for messages.
        command: What comes before the arguments. It speaks as `child.py` does.
        env: Variables set in addition to the current ones.
    """

    name: str
    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)


# -P: its folder is not put on the path, where our modules could be taken for others.
VLLM = Program(name="vLLM", command=(sys.executable, "-P", str(Path(child.__file__))))


class Child:
    """A running program.

    After any error it is of no more use: what it would answer next is unknown.
    """

    def __init__(self, process: subprocess.Popen[bytes], log_path: Path, name: str) -> None:
        self._process = process
        self._buffer = bytearray()
        self._name = name
        self.log_path = log_path

    def send(self, request: Mapping[str, Any]) -> None:
        """Hand over one request.

        Raises:
            ToolError: The process has ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure("") from None

    def receive(self, timeout_s: float, setting: str) -> dict[str, Any]:
        """The next message.

        Args:
            timeout_s: Longest time to wait for it.
            setting: Config path of that time, for the message.

        Raises:
            ToolError: The process ended, or did not answer in time.
            PipelineError: It says that the request failed.
        """
        deadline = time.monotonic() + timeout_s
        while (end := self._buffer.find(b"\n")) < 0:
            self._fill(deadline, timeout_s, setting)
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        message: dict[str, Any] = json.loads(line)
        if message["kind"] == "error":
            raise PipelineError(f"{self._name} failed: {message['message']}; see {self.log_path}")
        return message

    def receive_bytes(self, size_bytes: int, timeout_s: float, setting: str) -> bytes:
        """The raw bytes behind a message; as `receive`."""
        deadline = time.monotonic() + timeout_s
        while len(self._buffer) < size_bytes:
            self._fill(deadline, timeout_s, setting)
        data = bytes(self._buffer[:size_bytes])
        del self._buffer[:size_bytes]
        return data

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

    def _failure(self, hint: str) -> ToolError:
        """What is known of a process that ended or hangs; it is ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.0 if hint else _END_S)
        end_group(self._process)
        return ToolError(
            stage=f"runner {self._name.lower()}",
            command=[str(part) for part in self._process.args],  # type: ignore[union-attr]
            returncode=self._process.returncode,
            log_path=self.log_path,
            last_lines=last_lines(self.log_path),
            hint=hint,
        )

    def end(self) -> None:
        """Let it end by itself, and end what is left of it."""
        with contextlib.suppress(BrokenPipeError, ToolError):
            self.send({"kind": "end"})
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        end_group(self._process)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and what it started; harmless when they have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def running_child(
    arguments: Sequence[str], *, program: Program = VLLM, log_path: Path | None = None
) -> Iterator[Child]:
    """Start a program; leaving the context ends it, and with it the GPU memory that it holds.

    Args:
        arguments: Of the program.
        program: What is started.
        log_path: Where its log goes, which then stays; by default a file in the system's temporary
            folder, which stays when it failed and goes otherwise.
    """
    kept = log_path is not None
    if log_path is None:
        descriptor, name = tempfile.mkstemp(
            prefix=f"enginesmith-{program.name.lower()}-", suffix=".log"
        )
        os.close(descriptor)
        log_path = Path(name)
    command = [*program.command, *arguments]
    with log_path.open("wb") as stream:
        stream.write(f"$ {command!r}\n".encode())
        stream.flush()
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stream,
            env={**os.environ, **program.env},
            start_new_session=True,
        )
    try:
        running = Child(process, log_path, program.name)
        yield running
        running.end()
    except PipelineError:
        raise  # its message names the log
    except BaseException:
        if not kept:
            log_path.unlink()
        raise
    else:
        if not kept:
            log_path.unlink()
    finally:
        end_group(process)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def generate_request(
    prompts: Sequence[Sequence[int]], osl: int, demands: Demands | None
) -> dict[str, Any]:
    """`Session.generate` as a program reads it that speaks as `child.py`."""
    request: dict[str, Any] = {
        "kind": "generate",
        "prompts": [list(prompt) for prompt in prompts],
        "osl": osl,
    }
    if demands is not None:
        request["demands"] = demands.to_json()
    return request


def stream_tokens(
    child: Child,
    receive: Callable[[], dict[str, Any]],
    prompt: Sequence[int],
    max_new_tokens: int,
    eos_token_ids: frozenset[int],
) -> Iterator[int]:
    """`Session.stream` of a program that speaks as `child.py`.

    Args:
        child: The program.
        receive: Gives its next message, or raises.
        prompt: Token ids.
        max_new_tokens: The answer ends after so many.
        eos_token_ids: It ends at these, which are not yielded.
    """
    child.send(
        {
            "kind": "stream",
            "prompt": list(prompt),
            "max_new_tokens": max_new_tokens,
            "stop": sorted(eos_token_ids),
        }
    )
    ended = False
    try:
        while (message := receive())["kind"] == "token":
            yield int(message["token"])
        ended = True
    except PipelineError:
        ended = True
        raise
    finally:
        if not ended:  # the caller wants no more: the next answer must not be this stream's
            child.send({"kind": "cancel"})
            with contextlib.suppress(PipelineError):
                while receive()["kind"] == "token":
                    pass
