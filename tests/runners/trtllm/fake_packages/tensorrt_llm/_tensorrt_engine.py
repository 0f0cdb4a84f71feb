"""`tensorrt_llm._tensorrt_engine`: an LLM whose next token is a plain function of its prompt.

`$FAKE_LLM`: `die` ends the process at the first request.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorrt_llm import SamplingParams
from tensorrt_llm.llmapi import KvCacheConfig


def next_token(prompt: list[int], vocab: int) -> int:
    """Depends on every token and on their number."""
    return (7 * sum(prompt) + len(prompt)) % vocab


class Rows:
    """As much of a tensor as the runner asks for; more rows than tokens, as the real one may."""

    def __init__(self, rows: list[list[float]]) -> None:
        self._rows = rows
        self.shape = (1, len(rows), len(rows[0]))

    def float(self) -> Rows:
        return self

    def cpu(self) -> Rows:
        return self

    def numpy(self) -> Rows:
        return self

    def reshape(self, *shape: int) -> list[Rows]:
        assert shape == (-1, self.shape[-1])
        return [Rows([row]) for row in self._rows]

    def tobytes(self) -> bytes:
        (row,) = self._rows
        return struct.pack(f"<{len(row)}f", *row)


class Completion:
    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.generation_logits: Rows | None = None


class Result:
    def __init__(self, vocab: int, prompt: list[int], params: SamplingParams) -> None:
        self._vocab, self._known, self._left = vocab, list(prompt), params.max_tokens
        self._wants_logits = params.return_generation_logits
        self.outputs = [Completion()]
        self.finished = False

    def __iter__(self) -> Iterator[Result]:
        return self

    def __next__(self) -> Result:
        if self.finished:
            raise StopIteration
        token = next_token(self._known, self._vocab)
        self._known.append(token)
        self.outputs[0].token_ids.append(token)
        if self._wants_logits:
            row = [-float(abs(index - token)) for index in range(self._vocab)]
            self.outputs[0].generation_logits = Rows([row, [0.0] * self._vocab])
        self._left -= 1
        self.finished = self._left <= 0
        return self

    def abort(self) -> None:
        print("aborted", flush=True)
        self.finished = True


class LLM:
    def __init__(
        self,
        model: str,
        tokenizer: Any = None,
        skip_tokenizer_init: bool = False,
        tensor_parallel_size: int = 1,
        *,
        gather_generation_logits: bool = False,
        enable_chunked_prefill: bool = False,
        kv_cache_config: KvCacheConfig | None = None,
    ) -> None:
        config = json.loads((Path(model) / "config.json").read_text())
        if not (Path(model) / "rank0.engine").is_file():
            raise FileNotFoundError(model)
        self._vocab = config["pretrained_config"]["vocab_size"]
        self._max_seq_len = config["build_config"]["max_seq_len"]
        self._gather, self._chunked = gather_generation_logits, enable_chunked_prefill
        assert skip_tokenizer_init
        print(f"cache {vars(kv_cache_config) if kv_cache_config else None}", flush=True)
        print(f"chunked {enable_chunked_prefill}", flush=True)

    def _result(self, prompt: list[int], params: SamplingParams) -> Result:
        if os.environ.get("FAKE_LLM") == "die":
            os._exit(3)
        if params.end_id is None:
            raise ValueError("tokenizer is required to reset end_id if it is None")
        if params.return_context_logits:
            raise ValueError("requires gather_context_logits in the build")
        if params.return_generation_logits and not self._gather:
            raise ValueError("requires gather_generation_logits")
        if not self._chunked and len(prompt) + params.max_tokens > self._max_seq_len:
            raise ValueError(f"should not exceed max_seq_len ({self._max_seq_len})")
        return Result(self._vocab, prompt, params)

    def generate(
        self, inputs: list[list[int]], sampling_params: SamplingParams, use_tqdm: bool = True
    ) -> list[Result]:
        results = [
            self._result(prompt, SamplingParams(**vars(sampling_params))) for prompt in inputs
        ]
        for result in results:
            for _ in result:
                pass
        return results

    def generate_async(
        self, inputs: list[int], sampling_params: SamplingParams, streaming: bool = False
    ) -> Result:
        assert streaming
        return self._result(inputs, sampling_params)
