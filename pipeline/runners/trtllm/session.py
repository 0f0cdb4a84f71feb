"""The caller's side of `child.py`: a session on an engine that another process has loaded."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import Fault, PipelineError, RecipeError
from pipeline.formats.trtllm.container import Shared
from pipeline.formats.trtllm.place import Place
from pipeline.runners.session import Demands, Generation
from pipeline.runners.trtllm import child

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_POLL_S = 0.005
_BEAT_S = 5.0
_JOIN_S = 60.0
_DAY_S = 24 * 3600.0


@dataclass(frozen=True, kw_only=True)
class SessionSettings:
    """What the engine is loaded with.

    Attributes:
        kv_cache_fraction: Share of the memory left after loading that the KV cache gets.
        attention_window: Sliding window that the runtime must be told, tokens; None for none.
        chunked_prefill: Prompts longer than `max_num_tokens` are prefilled in pieces.
    """

    kv_cache_fraction: float
    attention_window: int | None
    chunked_prefill: bool


class TrtLlmSession:
    """`pipeline.runners.session.Session` on an engine in another process.

    Timing: `generate` runs the batch twice, once for one token; figures that are published come
    from `trtllm-bench`.
    """

    def __init__(self, folder: Path, running: _Running) -> None:
        self._folder = folder
        self._running = running
        self._number = 0

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        import numpy as np

        number = self._send({"kind": "logits", "tokens": list(tokens)})
        rows, vocab = self._receive(number)["shape"]
        path = self._folder / f"result-{number}.bin"
        values = np.fromfile(path, dtype="<f4").reshape(rows, vocab)
        path.unlink()
        return values

    def generate(
        self, prompts: Sequence[Sequence[int]], osl: int, demands: Demands | None = None
    ) -> Generation:
        import numpy as np

        if demands is not None:
            message = "runner=trtllm executes batches of equal requests only"
            raise RecipeError([Fault("", message)])

        request = {"kind": "generate", "prompts": [list(p) for p in prompts], "osl": osl}
        answer = self._receive(self._send(request))
        lengths = {len(row) for row in answer["tokens"]}
        if lengths != {osl} or len(answer["tokens"]) != len(prompts):
            raise PipelineError(
                f"asked {len(prompts)} requests for {osl} tokens each, got "
                f"{len(answer['tokens'])} with {sorted(lengths)}; see {self._running.log_path}"
            )
        return Generation(
            tokens=np.array(answer["tokens"], np.int64),
            ttft_s=float(answer["ttft_s"]),
            total_s=float(answer["total_s"]),
        )

    def stream(
        self, prompt: Sequence[int], max_new_tokens: int, eos_token_ids: frozenset[int]
    ) -> Iterator[int]:
        number = self._send(
            {
                "kind": "stream",
                "prompt": list(prompt),
                "max_new_tokens": max_new_tokens,
                "stop": sorted(eos_token_ids),
            }
        )
        path, result = (self._folder / name for name in (f"tokens-{number}.txt", _result(number)))
        sent = 0
        try:
            while True:
                ended = result.exists()  # asked before reading: nothing comes after it
                lines = path.read_text().split("\n")[:-1] if path.exists() else []
                yield from (int(line) for line in lines[sent:])
                sent = len(lines)
                if ended:
                    break
                self._running.check()
                time.sleep(_POLL_S)
        finally:
            (self._folder / f"cancel-{number}").touch()
        self._receive(number)

    def _send(self, request: Mapping[str, Any]) -> int:
        self._number += 1
        private = self._folder / f".request-{self._number}.json"
        private.write_text(json.dumps(request))
        private.rename(self._folder / f"request-{self._number}.json")
        return self._number

    def _receive(self, number: int) -> dict[str, Any]:
        path = self._folder / _result(number)
        self._running.wait_for(path)
        answer: dict[str, Any] = json.loads(path.read_text())
        if "error" in answer:
            raise PipelineError(
                f"TensorRT-LLM failed: {answer['error']}; see {self._running.log_path}"
            )
        return answer


def _result(number: int) -> str:
    return f"result-{number}.json"


class _Running(threading.Thread):
    """Runs the child to its end; keeps what it ended with."""

    def __init__(self, place: Place, shared: Sequence[Shared], log_path: Path) -> None:
        super().__init__(daemon=True)
        self._place = place
        self._shared = tuple(shared)
        self.log_path = log_path
        self.fault: BaseException | None = None

    def run(self) -> None:
        script, folder = self._shared[0], self._shared[1]
        try:
            self._place.run(
                [self._place.python, self._place.path(script), self._place.path(folder)],
                self._shared,
                stage="runner",
                log_path=self.log_path,
                timeout_s=_DAY_S,
                heartbeat_s=_DAY_S,
            )
        except BaseException as error:  # raised again where somebody waits
            self.fault = error

    def check(self) -> None:
        """Raise what the child ended with, if it ended."""
        if not self.is_alive():
            raise self.fault or PipelineError(f"the runner ended by itself; see {self.log_path}")

    def wait_for(self, path: Path) -> None:
        """Until the child has written `path`."""
        while not path.exists():
            self.check()
            time.sleep(_POLL_S)


@contextlib.contextmanager
def open_session(
    place: Place, engine_dir: Path, settings: SessionSettings
) -> Iterator[TrtLlmSession]:
    """Load an engine; leaving the context ends the process that holds it.

    The log stays in the system's temporary folder when TensorRT-LLM failed, and goes otherwise.

    Raises:
        ToolError: The process failed.
        PipelineError: It did not load the engine.
    """
    descriptor, log_name = tempfile.mkstemp(prefix="enginesmith-runner-", suffix=".log")
    os.close(descriptor)
    log_path = Path(log_name)
    try:
        with tempfile.TemporaryDirectory(prefix="enginesmith-runner-") as name:
            yield from _session(place, engine_dir, settings, Path(name), log_path)
    except PipelineError:
        raise  # its message names the log
    except BaseException:
        log_path.unlink()
        raise
    log_path.unlink()


def _session(
    place: Place, engine_dir: Path, settings: SessionSettings, folder: Path, log_path: Path
) -> Iterator[TrtLlmSession]:
    """Start the process with `folder` as the channel, yield once, and end it."""
    engine = Shared(name="engine", source=engine_dir)
    shared = (
        Shared(name="child.py", source=Path(child.__file__)),
        Shared(name="channel", source=folder, read_only=False),
        engine,
    )
    content = {**vars(settings), "engine_dir": place.path(engine)}
    (folder / "settings.json").write_text(json.dumps(content))
    running = _Running(place, shared, log_path)
    with _alive(folder):
        running.start()
        try:
            running.wait_for(folder / "ready")
            yield TrtLlmSession(folder, running)
        finally:
            (folder / "stop").touch()
            running.join(_JOIN_S)


@contextlib.contextmanager
def _alive(folder: Path) -> Iterator[None]:
    """Touch `alive` from a thread, whatever this one does meanwhile."""
    done = threading.Event()

    def beat() -> None:
        while not done.is_set():
            with contextlib.suppress(FileNotFoundError):
                (folder / "alive").touch()
            done.wait(_BEAT_S)

    thread = threading.Thread(target=beat, daemon=True)
    (folder / "alive").touch()
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
