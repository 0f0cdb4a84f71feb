"""Holds a loaded engine and answers requests from a folder; runs where TensorRT-LLM is.

    python3 child.py FOLDER

The folder is the only channel: it works the same beside us and in a container without a network.
`settings.json` says what to load; `ready` appears when it is loaded. Then, for N = 1, 2, ...:

    request-N.json   {"kind": "logits", "tokens": [...]}
                     {"kind": "generate", "prompts": [[...], ...], "osl": n}
                     {"kind": "stream", "prompt": [...], "max_new_tokens": n, "stop": [...]}
    result-N.json    the answer; for logits with their shape, and raw float32 in result-N.bin
    tokens-N.txt     a stream's tokens as they come, one in a line; its result ends it
    cancel-N         from the caller: stop streaming

The caller touches `alive` while it lives and makes `stop` when it is done; without either this
process ends by itself, so that no killed caller leaves a GPU taken.

Standard library only, beside `tensorrt_llm` itself: the image need not have this project.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

POLL_S = 0.005
WATCH_S = 0.5
ALIVE_S = 60.0
"""A caller that did not touch `alive` for so long is gone."""
GRACE_S = 5.0
"""After `stop`, before the process is ended in the middle of something."""


class Model(Protocol):
    """A loaded engine."""

    def logits(self, tokens: Sequence[int]) -> tuple[tuple[int, int], bytes]:
        """Shape and raw float32 of the logits of every position."""
        ...

    def generate(self, prompts: Sequence[Sequence[int]], osl: int) -> dict[str, Any]:
        """Keys `tokens`, `ttft_s`, `total_s`."""
        ...

    def stream(self, prompt: Sequence[int], max_new_tokens: int) -> Iterator[int]:
        """Tokens as they come."""
        ...


class TrtLlmModel:
    """An engine in `tensorrt_llm._tensorrt_engine.LLM`, greedy, end-of-sequence ignored.

    Signatures: llmapi/llm.py, llmapi/llm_args.py (TrtLlmArgs) and sampling_params.py of the 1.2
    line. Not run: no machine with TensorRT-LLM was at hand.

    Logits: an engine gives those of its prompt only if it was built with `gather_context_logits`,
    whose output of max_num_tokens x vocabulary would be in everybody's way. Those of a generated
    token are a runtime option. So each position asks for one token after its own prefix; a window
    of N tokens costs N (N + 1) / 2 prefilled tokens. Prefixes are not reused: a reused block gives
    other last bits than a computed one (TensorRT-LLM issue 15503).
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        from tensorrt_llm import SamplingParams
        from tensorrt_llm._tensorrt_engine import LLM
        from tensorrt_llm.llmapi import KvCacheConfig

        cache: dict[str, Any] = {
            "free_gpu_memory_fraction": settings["kv_cache_fraction"],
            "enable_block_reuse": False,
        }
        if settings["attention_window"] is not None:
            cache["max_attention_window"] = [settings["attention_window"]]
        self._sampling = SamplingParams
        self._llm = LLM(
            model=settings["engine_dir"],
            skip_tokenizer_init=True,
            gather_generation_logits=True,
            enable_chunked_prefill=settings["chunked_prefill"],
            kv_cache_config=KvCacheConfig(**cache),
        )

    def logits(self, tokens: Sequence[int]) -> tuple[tuple[int, int], bytes]:
        prefixes = [list(tokens[: end + 1]) for end in range(len(tokens))]
        outputs = self._llm.generate(
            prefixes, self._params(1, return_generation_logits=True), use_tqdm=False
        )
        rows, vocab = [], 0
        for output in outputs:
            found = output.outputs[0].generation_logits
            vocab = int(found.shape[-1])
            # There may be more rows than tokens: "nvbug 5324291" in executor/result.py.
            first = found.float().cpu().reshape(-1, vocab)[0]
            rows.append(first.numpy().tobytes())
        return (len(rows), vocab), b"".join(rows)

    def generate(self, prompts: Sequence[Sequence[int]], osl: int) -> dict[str, Any]:
        started = time.perf_counter()
        self._tokens(prompts, 1)
        first = time.perf_counter()
        tokens = self._tokens(prompts, osl)
        ended = time.perf_counter()
        return {"tokens": tokens, "ttft_s": first - started, "total_s": ended - first}

    def _tokens(self, prompts: Sequence[Sequence[int]], osl: int) -> list[list[int]]:
        outputs = self._llm.generate(
            [list(prompt) for prompt in prompts], self._params(osl), use_tqdm=False
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    def stream(self, prompt: Sequence[int], max_new_tokens: int) -> Iterator[int]:
        result = self._llm.generate_async(
            list(prompt), self._params(max_new_tokens), streaming=True
        )
        sent = 0
        try:
            for output in result:
                tokens = output.outputs[0].token_ids
                yield from tokens[sent:]
                sent = len(tokens)
        finally:
            if not result.finished:
                result.abort()

    def _params(self, max_tokens: int, **more: Any) -> Any:
        # -1 is no token: as trtllm-bench does to ignore end-of-sequence.
        return self._sampling(max_tokens=max_tokens, end_id=-1, pad_id=-1, top_k=1, **more)


def serve(folder: Path, model: Model) -> None:
    """Answer requests in their order until `stop` appears."""
    (folder / "ready").touch()
    number = 1
    while not (folder / "stop").exists():
        request = folder / f"request-{number}.json"
        if not request.exists():
            time.sleep(POLL_S)
            continue
        try:
            answer = _answer(folder, number, model, json.loads(request.read_text()))
        except Exception as error:  # the caller tells it; the log has the traceback
            import traceback

            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        _write(folder / f"result-{number}.json", json.dumps(answer).encode())
        number += 1


def _answer(folder: Path, number: int, model: Model, request: dict[str, Any]) -> dict[str, Any]:
    if request["kind"] == "logits":
        shape, data = model.logits(request["tokens"])
        _write(folder / f"result-{number}.bin", data)
        return {"shape": list(shape)}
    if request["kind"] == "generate":
        return model.generate(request["prompts"], request["osl"])
    stop, cancel = set(request["stop"]), folder / f"cancel-{number}"
    tokens = model.stream(request["prompt"], request["max_new_tokens"])
    with (folder / f"tokens-{number}.txt").open("w", buffering=1) as stream:
        for token in tokens:
            if token in stop or cancel.exists():
                break
            stream.write(f"{token}\n")
    return {}


def _write(path: Path, data: bytes) -> None:
    """Visible by one rename, so that the caller never reads half of it."""
    private = path.with_name(f".{path.name}")
    private.write_bytes(data)
    private.rename(path)


def watch(folder: Path) -> None:
    """End this process when its caller is gone, or did not get it to stop."""
    while True:
        time.sleep(WATCH_S)
        try:
            silent_s = time.time() - (folder / "alive").stat().st_mtime
        except FileNotFoundError:
            silent_s = ALIVE_S + 1
        if (folder / "stop").exists():
            time.sleep(GRACE_S)
            os._exit(1)
        if silent_s > ALIVE_S:
            print("the caller is gone", flush=True)
            os._exit(1)


def main(folder: Path) -> None:
    """Load what `settings.json` says, and serve."""
    settings = json.loads((folder / "settings.json").read_text())
    threading.Thread(target=watch, args=(folder,), daemon=True).start()
    serve(folder, TrtLlmModel(settings))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
