"""A model for `pipeline.runners.children.main`, with arithmetic for weights and faults on demand.

It needs nothing but the standard library.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from typing import Any

VOCAB = 32


class CorruptError(Exception):
    """Known to the caller by its name."""


class IncompatibleError(Exception):
    """Known to the caller by its name."""


class OutOfMemoryError(RuntimeError):
    """As PyTorch calls its own."""


def load(fault: str = "", context: int | None = None) -> ToyModel:
    return ToyModel(fault, context)


def continued(prompt: Sequence[int], count: int, vocab: int = VOCAB) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append((7 * sum(tokens) + len(tokens)) % vocab)
    return tokens[len(prompt) :]


class Rows:
    """As much of an array as a frame takes."""

    dtype = "<f4"

    def __init__(self, rows: list[list[float]]) -> None:
        self.shape = (len(rows), VOCAB)
        self._values = [value for row in rows for value in row]

    def tobytes(self) -> bytes:
        return struct.pack(f"<{len(self._values)}f", *self._values)


class ToyModel:
    def __init__(self, fault: str, context: int | None) -> None:
        self.context = context
        self._fault = fault
        self._misbehave("load")

    def _misbehave(self, where: str) -> None:
        """Do what `fault` says, such as `die-generate`."""
        print("printed to standard output", flush=True)
        kind, _, place = self._fault.partition("-")
        if place != where:
            return
        if kind == "die":
            print("the last words", file=sys.stderr, flush=True)
            os._exit(17)
        if kind == "hang":
            time.sleep(600)
        if kind == "garbage":  # past the file descriptor that it should use
            for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
                if int(name) > 2 and "pipe" in os.readlink(f"/proc/self/fd/{name}"):  # noqa: PTH115
                    try:
                        os.write(int(name), b"from a library that found the pipe\n")
                    except OSError:
                        continue
        if kind == "grandchild":
            program = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
            started = subprocess.Popen([sys.executable, "-c", program])
            print(f"grandchild {started.pid}", file=sys.stderr, flush=True)
        errors: dict[str, Exception] = {
            "corrupt": CorruptError("the file is cut"),
            "incompatible": IncompatibleError("another card"),
            "memory": OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            "value": ValueError("longer than the context"),
        }
        if kind in errors:
            raise errors[kind]
        if kind == "logged":
            print("torch.OutOfMemoryError: CUDA out of memory", file=sys.stderr, flush=True)
            raise RuntimeError("Engine core initialization failed")

    def logits(self, tokens: Sequence[int]) -> Rows:
        self._misbehave("logits")
        known = len(tokens) - (self._fault == "short")
        rows = []
        for end in range(known):
            (best,) = continued(tokens[: end + 1], 1)
            rows.append([-float((token - best) % VOCAB) for token in range(VOCAB)])
        if self._fault == "nan":
            rows[0][3] = float("nan")
        return Rows(rows)

    def generate(
        self, prompts: Sequence[Sequence[int]], osl: int, options: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        self._misbehave("generate")
        count = osl - (self._fault == "short")
        tokens = [continued(prompt, count) for prompt in prompts]
        return {"tokens": tokens, "ttft_s": 0.5, "total_s": 1.0}

    def stream(
        self, prompt: Sequence[int], max_new_tokens: int, eos_token_ids: Sequence[int]
    ) -> Generator[int, None, None]:
        tokens = list(prompt)
        for place in range(max_new_tokens):
            if place == 2:
                self._misbehave("stream")
            tokens += continued(tokens, 1)
            if tokens[-1] in eos_token_ids:
                return
            yield tokens[-1]
