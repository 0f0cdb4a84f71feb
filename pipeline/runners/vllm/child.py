"""Holds a model in vLLM and answers requests on standard input; the memory goes when it ends.

    python -P child.py --model FOLDER [arguments of `vllm serve`]

Requests come as JSON lines:

    {"kind": "logits", "tokens": [...]}
    {"kind": "generate", "prompts": [[...], ...], "osl": n, "demands": {...}}
    {"kind": "stream", "prompt": [...], "max_new_tokens": n, "stop": [...]}
    {"kind": "clear_cache"} frees what an allocator keeps, of a model that has such
    {"kind": "cancel"}      ends a stream early; without one it is ignored
    {"kind": "end"}         ends the process

`demands` may be left out; it has the keys of `pipeline.runners.session.Demands.to_json`.

Answers go to what was standard output when it started, as JSON lines: one `ready` when the model
is loaded; `token` for each token of a stream; then `result` or `error`, one for each request. A
result with `size_bytes` is followed by so many raw bytes. What vLLM itself prints goes to standard
error. When standard input ends without `end`, the caller is gone: the whole process group is
killed, so that no killed caller leaves a GPU taken.

Standard library beside `vllm` and NumPy: it also runs where this project is not installed. Names
and signatures are those of vLLM 0.24.0.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, Protocol

Request = dict[str, Any]
CHUNK_BYTES = 1 << 20


class Model(Protocol):
    """A loaded model."""

    def logits(self, tokens: Sequence[int]) -> tuple[tuple[int, int], bytes]:
        """Shape and raw float32 of every position's log-probabilities."""
        ...

    def generate(
        self, prompts: Sequence[Sequence[int]], osl: int, demands: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Keys `tokens`, `total_s`, and of each program its own; `demands` may be empty."""
        ...

    def stream(
        self, prompt: Sequence[int], max_new_tokens: int, stop: Sequence[int]
    ) -> Iterator[int]:
        """Tokens as they come; a token of `stop` ends them and is not among them."""
        ...


class VllmModel:
    """A model in `vllm.LLM`, greedy.

    `arguments` are read by vLLM's own parser, so that the engine is set up as its server would be,
    statistics included: without them a request has no metrics.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        from vllm import LLM, EngineArgs, SamplingParams
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
        self._sampling = SamplingParams
        self._llm = LLM.from_engine_args(
            EngineArgs.from_cli_args(parser.parse_args(list(arguments)))
        )
        self._streams = 0
        self._served = 0

    def logits(self, tokens: Sequence[int]) -> tuple[tuple[int, int], bytes]:
        """Log-probabilities [tokens, vocab], which are the logits up to a constant per position.

        vLLM gives those of prompt token i + 1 with position i's prefix (`prompt_logprobs`, its
        first entry empty), and those of the one generated token, which are the last row. It sorts
        each row by value and puts the actual token in front of it, hence V + 1 pairs for V tokens.
        `flat_logprobs` keeps them in lists instead of one object for each number.
        """
        import numpy as np

        params = self._params(1, prompt_logprobs=-1, logprobs=-1, flat_logprobs=True)
        (output,) = self._llm.generate([_prompt(tokens)], params, use_tqdm=False)
        rows: list[Any] = []
        for flat, skipped in ((output.prompt_logprobs, 1), (output.outputs[0].logprobs, 0)):
            ids = np.array(flat.token_ids, np.int64)
            values = np.array(flat.logprobs, np.float32)
            bounds = zip(flat.start_indices[skipped:], flat.end_indices[skipped:], strict=True)
            for start, end in bounds:
                row = np.full(end - start - 1, np.nan, np.float32)
                row[ids[start:end]] = values[start:end]
                rows.append(row)
        matrix = np.stack(rows)
        return matrix.shape, matrix.astype("<f4").tobytes()

    def generate(
        self, prompts: Sequence[Sequence[int]], osl: int, demands: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Time requests: all of a batch are handed over at once, others as they arrive."""
        batch = [_prompt(prompt) for prompt in prompts]
        # Ids are given one by one: without its tokenizer vLLM would know of one at most.
        ends = {"stop_token_ids": demands["eos"]} if demands.get("eos") else {}
        each = demands.get("osl_each") or [osl] * len(batch)
        params = [self._params(limit, **ends) for limit in each]
        started = time.perf_counter()
        if demands.get("arrivals_s"):
            arrivals, at_once = demands["arrivals_s"], demands["max_concurrency"]
            outputs = self._serve(batch, params, arrivals, at_once or len(batch))
        else:
            outputs = self._llm.generate(batch, params, use_tqdm=False)
        total_s = time.perf_counter() - started
        return {
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            "total_s": total_s,
            "requests": [_metrics(output.metrics) for output in outputs],
        }

    def _serve(
        self, batch: Sequence[Any], params: Sequence[Any], arrivals_s: Sequence[float], at_once: int
    ) -> list[Any]:
        """Hand each request to the engine when it arrives; their outputs in the same order.

        A request is handed over between two steps of the engine, so up to one step late, and later
        where `at_once` run already. vLLM is told when it arrived: its time to the first token
        counts from there. Arrivals are of the wall clock, as vLLM's own.
        """
        from vllm.sampling_params import RequestOutputKind

        engine = self._llm.llm_engine
        for one in params:
            one.output_kind = RequestOutputKind.FINAL_ONLY
        self._served += 1
        waiting = deque(range(len(batch)))
        names: dict[str, tuple[int, str]] = {}  # those that run: their place, and vLLM's own name
        outputs: dict[int, Any] = {}
        began = time.time()
        try:
            while waiting or names:
                while (
                    waiting
                    and len(names) < at_once
                    and time.time() >= began + arrivals_s[waiting[0]]
                ):
                    place = waiting.popleft()
                    name = f"serve-{self._served}-{place}"
                    arrived = began + arrivals_s[place]
                    own = engine.add_request(name, batch[place], params[place], arrived)
                    names[name] = (place, own)
                if not names:
                    time.sleep(max(began + arrivals_s[waiting[0]] - time.time(), 0.0))
                    continue
                for output in engine.step():
                    if output.finished:
                        outputs[names.pop(output.request_id)[0]] = output
        finally:
            if names:  # something failed: what is left would run into the next request
                engine.abort_request([own for _, own in names.values()], internal=True)
        return [outputs[place] for place in range(len(batch))]

    def stream(
        self, prompt: Sequence[int], max_new_tokens: int, stop: Sequence[int]
    ) -> Iterator[int]:
        from vllm.sampling_params import RequestOutputKind

        engine, ended = self._llm.llm_engine, False
        params = self._params(
            max_new_tokens, stop_token_ids=list(stop), output_kind=RequestOutputKind.DELTA
        )
        self._streams += 1
        name = engine.add_request(f"stream-{self._streams}", _prompt(prompt), params)
        try:
            while not ended:
                for output in engine.step():
                    yield from (t for t in output.outputs[0].token_ids if t not in stop)
                    ended = output.finished
        finally:
            if not ended:
                engine.abort_request([name], internal=True)

    def _params(self, max_tokens: int, **more: Any) -> Any:
        return self._sampling(
            temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, **more
        )


def _prompt(tokens: Sequence[int]) -> dict[str, Any]:
    """As vLLM's renderer gives it to the engine (`vllm.inputs.engine.tokens_input`)."""
    return {"type": "token", "prompt_token_ids": list(tokens)}


def _metrics(stats: Any) -> dict[str, Any] | None:
    """What `vllm.v1.metrics.stats.RequestStateStats` has for a finished request.

    `first_token_latency` is wall-clock time since the arrival; the two others are of the engine's
    monotonic clock, good for differences only.
    """
    if stats is None:
        return None
    names = ("first_token_latency", "first_token_ts", "last_token_ts", "num_generation_tokens")
    return {**{name: getattr(stats, name) for name in names}, "corrupted": stats.is_corrupted}


class Channel:
    """Both directions, seen from this process."""

    def __init__(self, source: int, sink: BinaryIO, on_lost: Callable[[], None]) -> None:
        self._sink = sink
        self._requests: queue.Queue[Request] = queue.Queue()
        threading.Thread(target=self._read, args=(source, on_lost), daemon=True).start()

    def _read(self, source: int, on_lost: Callable[[], None]) -> None:
        """Read a file descriptor: a file object's lock would stay locked in a fork."""
        pending = b""
        while data := os.read(source, CHUNK_BYTES):
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                request = json.loads(line)
                self._requests.put(request)
                if request["kind"] == "end":
                    return
        on_lost()

    def receive(self) -> Request:
        """The next request; waits."""
        return self._requests.get()

    def cancelled(self) -> bool:
        """The caller has sent something while a stream was on: it wants no more of it."""
        return not self._requests.empty()

    def send(self, message: dict[str, Any], data: bytes = b"") -> None:
        self._sink.write(json.dumps(message).encode() + b"\n" + data)
        self._sink.flush()


def serve(channel: Channel, model: Model) -> None:
    """Answer requests in their order until `end`."""
    channel.send({"kind": "ready"})
    while (request := channel.receive())["kind"] != "end":
        if request["kind"] == "cancel":
            continue
        try:
            answer, data = _answer(channel, model, request)
        except Exception as error:  # the caller tells it; the log has the traceback
            import traceback

            traceback.print_exc()
            answer, data = {"kind": "error", "message": f"{type(error).__name__}: {error}"}, b""
        channel.send(answer, data)


def _answer(channel: Channel, model: Model, request: Request) -> tuple[dict[str, Any], bytes]:
    if request["kind"] == "logits":
        shape, data = model.logits(request["tokens"])
        return {"kind": "result", "shape": list(shape), "size_bytes": len(data)}, data
    if request["kind"] == "generate":
        made = model.generate(request["prompts"], request["osl"], request.get("demands") or {})
        return {"kind": "result", **made}, b""
    if request["kind"] == "clear_cache":
        clearing: Any = model  # the caller asks models only that have one
        clearing.clear_cache()
        return {"kind": "result"}, b""
    tokens = model.stream(request["prompt"], request["max_new_tokens"], request["stop"])
    for token in tokens:
        channel.send({"kind": "token", "token": token})
        if channel.cancelled():
            break
    tokens.close()  # type: ignore[attr-defined]  # a generator: aborts the request
    return {"kind": "result"}, b""


def _end_group() -> None:
    """End this process and the engine's, which vLLM starts in the same group."""
    os.killpg(0, signal.SIGKILL)


def serve_standard_streams(load: Callable[[], Model]) -> None:
    """Load a model and serve it.

    Standard output becomes the log's, for vLLM prints to it; standard input becomes empty, for
    every process that it forks closes it first.
    """
    source, sink = os.dup(0), os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "rb") as empty:  # noqa: PTH123
        os.dup2(empty.fileno(), 0)
    os.dup2(2, 1)
    channel = Channel(source, sink, _end_group)
    serve(channel, load())


if __name__ == "__main__":
    serve_standard_streams(lambda: VllmModel(sys.argv[1:]))
