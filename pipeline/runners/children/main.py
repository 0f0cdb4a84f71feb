"""The one main of every child process that holds a model; its memory goes when it ends.

    python -P main.py

Frames go both ways, from the caller on standard input and to it on standard output:

    MAGIC | length of the JSON text, 4 bytes | length of the data, 8 bytes | JSON text | data

`data` is one array, whose `dtype` and `shape` the JSON text has. The first frame says what to load:

    {"kind": "load", "model": FILE, "paths": [...], "arguments": {...}}

`paths` go to the front of `sys.path`, then FILE is imported, and its `load(**arguments)` gives a
model, which `ready` answers. It has a method for each kind of request, with these arguments, and
`context`, the most tokens of one request, or None. Requests and answers, one for each:

    {"kind": "logits", "tokens": [...]}                            result with an array
    {"kind": "generate", "prompts": [...], "osl": n, "options": …} result with the method's keys
    {"kind": "stream", "prompt": [...], "max_new_tokens": n, "eos_token_ids": [...]}
                                                                   `token` for each, then result
    {"kind": "cancel"}        ends a stream early; without one it is ignored
    {"kind": "end"}           ends the process, after the model's `close` if it has one

Logits, or log-probabilities, are float32 [tokens, vocab]. `generate` gives `tokens` (a list for
each request), `ttft_s`, `total_s`, and `requests` if known; `options` are the fields of
`pipeline.runners.workload.BatchOptions`. One of `eos_token_ids` ends a stream and is not in it.

A fault is {"kind": "error", "code": CLASS, "message": …} in place of a result; CLASS is one of
`CODES`. What libraries print goes to standard error. When standard input ends without `end`, the
caller is gone: the whole process group is killed, so that no killed caller leaves a GPU taken.

Standard library only: it runs under the interpreter that has the runtime, in a container too.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import signal
import struct
import sys
import threading
import traceback
from typing import Any

Message = dict[str, Any]
Array = Any
"""As much of a NumPy array as a frame needs: `dtype`, `shape`, `tobytes()`."""
Model = Any
"""What a file gives that no type checker sees with this one; the module's docstring has it."""

MAGIC = b"\x00ESF"
HEADER = struct.Struct(">4sIQ")
CODES = (
    "CorruptError",
    "IncompatibleError",
    "OutOfMemoryError",
    "RecipeError",
    "TransientError",
    "PipelineError",
)
"""Names of the classes in `pipeline.core.errors` that an error keeps on its way to the caller; the
last is that of all other errors. PyTorch's own class for a full card is called so too."""


def pack(message: Message, array: Array = None) -> bytes:
    """One frame."""
    data = b""
    if array is not None:
        data = array.tobytes()
        message = {**message, "dtype": str(array.dtype), "shape": list(array.shape)}
    text = json.dumps(message, default=sorted).encode()  # a set as a list
    return HEADER.pack(MAGIC, len(text), len(data)) + text + data


class Channel:
    """Both directions, seen from this process."""

    def __init__(self, source: int, sink: int) -> None:
        self._source, self._sink = source, sink
        self.requests: queue.Queue[Message] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        """Read the descriptor itself: a file object's lock would stay locked in a fork."""
        kind = ""
        while kind != "end":
            _, size, _ = HEADER.unpack(self._exactly(HEADER.size))
            request: Message = json.loads(self._exactly(size))
            kind = request["kind"]
            self.requests.put(request)

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = os.read(self._source, size - len(data))
            if not part:
                os.killpg(0, signal.SIGKILL)
            data += part
        return data

    def send(self, kind: str, array: Array = None, **values: Any) -> None:
        frame = memoryview(pack({"kind": kind, **values}, array))
        while frame:
            frame = frame[os.write(self._sink, frame) :]

    def send_error(self, error: Exception) -> None:
        """In the class that the caller raises; the log has the traceback."""
        traceback.print_exception(error)
        names = [one.__name__ for one in type(error).__mro__]
        code = next((name for name in names if name in CODES), CODES[-1])
        if isinstance(error, MemoryError):
            code = "OutOfMemoryError"
        text = str(error) if code == names[0] else f"{names[0]}: {error}"
        self.send("error", code=code, message=text)


def load_model(order: Message) -> Model:
    """Import the file that `order` names, and let it load."""
    sys.path[:0] = order["paths"]
    spec = importlib.util.spec_from_file_location("enginesmith_model", order["model"])
    if spec is None or spec.loader is None:
        raise ImportError(f"{order['model']} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    model: Model = module.load(**order["arguments"])
    return model


def serve(channel: Channel, model: Model) -> None:
    """Answer requests in their order until `end`."""
    channel.send("ready", context=model.context)
    while (request := channel.requests.get())["kind"] != "end":
        if request["kind"] == "cancel":
            continue
        try:
            answer, array = answer_of(channel, model, request)
        except Exception as error:  # the caller raises it
            channel.send_error(error)
        else:
            channel.send("result", array, **answer)


def answer_of(channel: Channel, model: Model, request: Message) -> tuple[Message, Array]:
    """The answer to one request; the tokens of a stream are sent at once."""
    kind = request["kind"]
    if kind == "logits":
        return {}, model.logits(request["tokens"])
    if kind == "generate":
        return model.generate(request["prompts"], request["osl"], request["options"]), None
    tokens = model.stream(request["prompt"], request["max_new_tokens"], request["eos_token_ids"])
    for token in tokens:
        channel.send("token", token=int(token))
        if not channel.requests.empty():  # the caller wants no more of it
            break
    tokens.close()  # aborts what is left of it
    return {}, None


def main() -> None:
    """Take both streams for the frames, then load and serve.

    Libraries print to standard output, now the log's; a forked process closes standard input first.
    """
    source, sink = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    channel = Channel(source, sink)
    try:
        model = load_model(channel.requests.get())
    except Exception as error:
        channel.send_error(error)
        sys.exit(1)
    serve(channel, model)
    if (close := getattr(model, "close", None)) is not None:
        close()


if __name__ == "__main__":
    main()
