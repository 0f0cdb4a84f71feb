"""Holds a model in `vllm.LLM`, in a child process; see `main.py` beside it.

Standard library beside `vllm` and NumPy. Names and signatures are those of vLLM 0.24.0.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from typing import Any


class CorruptError(Exception):
    """Known to the caller by its name."""


class VllmModel:
    """A model in vLLM, greedy; `arguments` are those of `vllm serve`, read by vLLM's own parser."""

    def __init__(self, arguments: Sequence[str]) -> None:
        from vllm import LLM, EngineArgs, SamplingParams
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
        parsed = EngineArgs.from_cli_args(parser.parse_args(list(arguments)))
        self.context: int | None = parsed.max_model_len or None
        self._sampling = SamplingParams
        self._llm = LLM.from_engine_args(parsed)
        self._numbers = itertools.count()

    def logits(self, tokens: Sequence[int]) -> Any:
        """Log-probabilities [tokens, vocab].

        vLLM gives those of prompt token i + 1 with position i's prefix (`prompt_logprobs`, its
        first entry empty), and those of the one generated token, the last row. It puts the actual
        token in front of each row, hence V + 1 pairs for V tokens.
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
        return np.stack(rows)

    def generate(
        self, prompts: Sequence[Sequence[int]], osl: int, options: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """Time requests: all of a batch are handed over at once, others as they arrive."""
        batch, asked = [_prompt(prompt) for prompt in prompts], options or {}
        # Ids are given one by one: without its tokenizer vLLM would know of one at most.
        eos = asked.get("eos_token_ids")
        ends = {"stop_token_ids": eos} if eos else {}
        each = asked.get("osl_each") or [osl] * len(batch)
        params = [self._params(limit, **ends) for limit in each]
        arrivals = asked.get("arrivals_s") or []
        started = time.perf_counter()
        if arrivals:
            outputs = self._serve(batch, params, arrivals, asked["max_concurrency"] or len(batch))
        else:
            outputs = self._llm.generate(batch, params, use_tqdm=False)
        total_s = time.perf_counter() - started
        requests = [
            _timing(output.metrics, arrivals[place] if arrivals else None)
            for place, output in enumerate(outputs)
        ]
        return {
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            "ttft_s": max(request["ttft_ms"] for request in requests) / 1e3,
            "total_s": total_s,
            "requests": requests,
        }

    def _serve(
        self, batch: Sequence[Any], params: Sequence[Any], arrivals_s: Sequence[float], at_once: int
    ) -> list[Any]:
        """Hand each request to the engine when it arrives; their outputs in the same order.

        That is between two steps, so up to one late, and later where `at_once` run already; vLLM's
        times count from the arrival.
        """
        from vllm.sampling_params import RequestOutputKind

        engine = self._llm.llm_engine
        for one in params:
            one.output_kind = RequestOutputKind.FINAL_ONLY
        number = next(self._numbers)
        waiting = deque(range(len(batch)))
        names: dict[str, tuple[int, str]] = {}  # those that run: their place, and vLLM's own name
        outputs: dict[int, Any] = {}
        began = time.time()
        try:
            while waiting or names:
                while waiting and len(names) < at_once:
                    place, name = waiting[0], f"serve-{number}-{waiting[0]}"
                    arrived = began + arrivals_s[place]
                    if time.time() < arrived:
                        break
                    waiting.popleft()
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
        self, prompt: Sequence[int], max_new_tokens: int, eos_token_ids: Sequence[int]
    ) -> Generator[int, None, None]:
        from vllm.sampling_params import RequestOutputKind

        engine, ended, ends = self._llm.llm_engine, False, list(eos_token_ids)
        params = self._params(
            max_new_tokens, stop_token_ids=ends, output_kind=RequestOutputKind.DELTA
        )
        name = engine.add_request(f"stream-{next(self._numbers)}", _prompt(prompt), params)
        try:
            while not ended:
                for output in engine.step():
                    yield from (t for t in output.outputs[0].token_ids if t not in ends)
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


def _timing(stats: Any, arrival_s: float | None) -> dict[str, Any]:
    """The fields of `RequestTiming`, from a finished request's `RequestStateStats`.

    Source: vllm/v1/metrics/stats.py. `first_token_latency` is wall-clock time since the arrival;
    the two others are of the engine's monotonic clock, good for differences only. vLLM looks for
    corrupted logits only with VLLM_COMPUTE_NANS_IN_LOGITS=1, which costs speed.
    """
    if stats is None:
        raise RuntimeError(
            "it gave no times of its requests; remove --disable-log-stats from runner.arguments "
            "and from the package's serve arguments"
        )
    if stats.is_corrupted:
        raise CorruptError("logits were not a number while it generated; check the checkpoint")
    ttft_ms = 1e3 * float(stats.first_token_latency)
    decode_ms = 1e3 * (float(stats.last_token_ts) - float(stats.first_token_ts))
    gaps = int(stats.num_generation_tokens) - 1
    return {
        "ttft_ms": ttft_ms,
        "request_latency_ms": ttft_ms + decode_ms,
        "itl_ms": decode_ms / gaps if gaps > 0 else None,
        "arrival_s": arrival_s,
    }


load = VllmModel
