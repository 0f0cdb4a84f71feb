"""Holds an engine in TensorRT-LLM, in a child process or a container; see `main.py` beside it.

Standard library beside `tensorrt_llm`. Signatures: llmapi/llm.py, llmapi/llm_args.py (TrtLlmArgs)
and sampling_params.py of the 1.2 line. Not run: no machine with TensorRT-LLM was at hand.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from typing import Any


class RecipeError(Exception):
    """Known to the caller by its name."""


class TrtLlmModel:
    """An engine in `tensorrt_llm._tensorrt_engine.LLM`, greedy, end-of-sequence ignored.

    Logits of a prompt take an engine with `gather_context_logits`, an output of max_num_tokens x
    vocabulary; those of a generated token are a runtime option. So each position asks for one token
    after its own prefix: N (N + 1) / 2 prefilled tokens. Prefixes are not reused: a reused block
    has other last bits (TensorRT-LLM issue 15503).

    Timing: a batch runs twice, once for one token, since `generate` tells no times of its requests.
    `gather_generation_logits` costs only the requests that ask for logits
    (batch_manager/handleGenerationLogits.cpp, 89fd9b74).
    """

    def __init__(
        self,
        *,
        engine_dir: str,
        context: int,
        kv_cache_fraction: float,
        attention_window: int | None,
        chunked_prefill: bool,
    ) -> None:
        from tensorrt_llm import SamplingParams
        from tensorrt_llm._tensorrt_engine import LLM
        from tensorrt_llm.llmapi import KvCacheConfig

        cache: dict[str, Any] = {
            "free_gpu_memory_fraction": kv_cache_fraction,
            "enable_block_reuse": False,
        }
        if attention_window is not None:
            cache["max_attention_window"] = [attention_window]
        self.context = context
        self._sampling = SamplingParams
        self._llm = LLM(
            model=engine_dir,
            skip_tokenizer_init=True,
            gather_generation_logits=True,
            enable_chunked_prefill=chunked_prefill,
            kv_cache_config=KvCacheConfig(**cache),
        )

    def logits(self, tokens: Sequence[int]) -> _Rows:
        prefixes = [list(tokens[: end + 1]) for end in range(len(tokens))]
        params = self._params(1, return_generation_logits=True)
        outputs = self._llm.generate(prefixes, params, use_tqdm=False)
        found = [output.outputs[0].generation_logits for output in outputs]
        vocab = int(found[0].shape[-1])
        # There may be more rows than tokens: "nvbug 5324291" in executor/result.py.
        firsts = [one.float().cpu().reshape(-1, vocab)[0].numpy().tobytes() for one in found]
        rows = _Rows(b"".join(firsts))
        rows.shape = (len(firsts), vocab)
        return rows

    def generate(
        self, prompts: Sequence[Sequence[int]], osl: int, options: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        if options is not None:
            raise RecipeError("runner=trtllm executes batches of equal requests only")
        started = time.perf_counter()
        self._tokens(prompts, 1)
        first = time.perf_counter()
        tokens = self._tokens(prompts, osl)
        total_s = time.perf_counter() - first
        # Two runs scatter: the first token cannot come after the last.
        return {"tokens": tokens, "ttft_s": min(first - started, total_s), "total_s": total_s}

    def _tokens(self, prompts: Sequence[Sequence[int]], osl: int) -> list[list[int]]:
        batch = [list(prompt) for prompt in prompts]
        outputs = self._llm.generate(batch, self._params(osl), use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def stream(
        self, prompt: Sequence[int], max_new_tokens: int, eos_token_ids: Sequence[int]
    ) -> Generator[int, None, None]:
        params = self._params(min(max_new_tokens, self.context - len(prompt)))
        result = self._llm.generate_async(list(prompt), params, streaming=True)
        sent = 0
        try:
            for output in result:
                tokens = output.outputs[0].token_ids
                for token in tokens[sent:]:
                    if token in eos_token_ids:
                        return
                    yield token
                sent = len(tokens)
        finally:
            if not result.finished:
                result.abort()

    def _params(self, max_tokens: int, **more: Any) -> Any:
        # -1 is no token: as trtllm-bench does to ignore end-of-sequence.
        return self._sampling(max_tokens=max_tokens, end_id=-1, pad_id=-1, top_k=1, **more)


class _Rows(bytes):
    """Logits as a frame takes them, without NumPy."""

    dtype = "<f4"
    shape: tuple[int, int]

    def tobytes(self) -> bytes:
        return self


load = TrtLlmModel
