"""Stands in for vLLM 0.24 in tests: what `vllm_model.py` calls, with arithmetic for a model.

`$FAKE_VLLM` makes it misbehave: see the places that use it. `$FAKE_VLLM_SEEN` is a file that gets
the arguments of every engine, one JSON line each; `$FAKE_VLLM_STEP_S` is how long a step takes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm.sampling_params import RequestOutputKind

VOCAB = 320
BEHAVIOUR = os.environ.get("FAKE_VLLM", "")
STEP_S = float(os.environ.get("FAKE_VLLM_STEP_S", "0.002"))


def next_token(prompt: list[int]) -> int:
    return (7 * sum(prompt) + len(prompt)) % VOCAB


@dataclass
class EngineArgs:
    model: str = ""
    max_model_len: int = 0
    max_num_seqs: int = 0
    kv_cache_dtype: str = "auto"
    skip_tokenizer_init: bool = False
    enable_prefix_caching: bool = True
    max_logprobs: int = 20
    gpu_memory_utilization: float = 0.92
    disable_log_stats: bool = False
    dtype: str = "auto"
    quantization: str | None = None
    max_num_batched_tokens: int = 0
    kv_cache_memory_bytes: int | None = None

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        for name in ("--model", "--kv-cache-dtype", "--dtype", "--quantization"):
            parser.add_argument(name)
        for name in ("--max-model-len", "--max-num-seqs", "--max-num-batched-tokens"):
            parser.add_argument(name, type=int)
        for name in ("--max-logprobs", "--kv-cache-memory-bytes"):
            parser.add_argument(name, type=int)
        parser.add_argument("--gpu-memory-utilization", type=float)
        for name in ("--skip-tokenizer-init", "--enable-prefix-caching", "--disable-log-stats"):
            parser.add_argument(name, action=argparse.BooleanOptionalAction)
        return parser

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> EngineArgs:
        given = {name: value for name, value in vars(args).items() if value is not None}
        return cls(**given)


@dataclass
class SamplingParams:
    temperature: float
    max_tokens: int
    ignore_eos: bool
    detokenize: bool
    prompt_logprobs: int | None = None
    logprobs: int | None = None
    flat_logprobs: bool = False
    stop_token_ids: list[int] = field(default_factory=list)
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE


@dataclass
class FlatLogprobs:
    start_indices: list[int] = field(default_factory=list)
    end_indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def add(self, best: int | None, actual: int) -> None:
        """One position: sorted by value, the actual token in front, as vLLM does."""
        self.start_indices.append(len(self.logprobs))
        if best is not None:
            values = {token: -0.25 * ((token - best) % VOCAB) for token in range(VOCAB)}
            order = [actual, *sorted(values, key=lambda token: -values[token])]
            self.token_ids += order
            self.logprobs += [values[token] for token in order]
        self.end_indices.append(len(self.logprobs))


@dataclass
class Stats:
    num_generation_tokens: int
    first_token_latency: float = 0.02
    first_token_ts: float = 100.0
    last_token_ts: float = 100.4
    is_corrupted: bool = BEHAVIOUR == "corrupted"


@dataclass
class Completion:
    token_ids: list[int]
    logprobs: FlatLogprobs | None = None


@dataclass
class RequestOutput:
    outputs: list[Completion]
    finished: bool = True
    metrics: Stats | None = None
    prompt_logprobs: FlatLogprobs | None = None
    request_id: str = ""


@dataclass
class Running:
    """A request that the engine holds: with vLLM's own name, its tokens and its times."""

    external: str
    tokens: list[int]
    params: SamplingParams
    stats: Stats
    arrived: float
    made: int = 0


class Engine:
    """Makes one token of each request a step, of the first `max_num_seqs` at once."""

    def __init__(self, args: EngineArgs) -> None:
        self.args = args
        self.running: dict[str, Running] = {}
        self.added = 0

    def add_request(
        self,
        request_id: str,
        prompt: dict[str, Any],
        params: SamplingParams,
        arrival_time: float | None = None,
    ) -> str:
        if params.output_kind is RequestOutputKind.DELTA:
            assert not self.running, "a request is still running"
        else:
            assert params.output_kind is RequestOutputKind.FINAL_ONLY
            if BEHAVIOUR == "raise-serve" and self.added == 2:
                raise ValueError("longer than the context")
        self.added += 1
        tokens = list(prompt["prompt_token_ids"])
        arrived = time.time() if arrival_time is None else arrival_time
        assert arrived <= time.time(), "it has not arrived yet"
        stats = Stats(num_generation_tokens=0)
        name = f"{request_id}-internal"
        assert name not in self.running
        self.running[name] = Running(request_id, tokens, params, stats, arrived)
        return name

    def step(self) -> list[RequestOutput]:
        assert self.running
        time.sleep(STEP_S)
        outputs = []
        for name, one in list(self.running.items())[: self.args.max_num_seqs or None]:
            if one.params.output_kind is RequestOutputKind.DELTA and one.made > 2000:
                os._exit(18)  # a stream that its caller has left goes on
            one.tokens.append(next_token(one.tokens))
            one.made += 1
            if one.made == 1:
                one.stats.first_token_latency = time.time() - one.arrived
                one.stats.first_token_ts = time.monotonic()
            one.stats.last_token_ts = time.monotonic()
            one.stats.num_generation_tokens = one.made
            ended = one.made == one.params.max_tokens or one.tokens[-1] in one.params.stop_token_ids
            if ended:
                del self.running[name]
            final = one.params.output_kind is RequestOutputKind.FINAL_ONLY
            if final and not ended:
                continue
            new = one.tokens[-one.made :] if final else one.tokens[-1:]
            output = RequestOutput(outputs=[Completion(new)], finished=ended)
            output.request_id, output.metrics = one.external, one.stats
            outputs.append(output)
        return outputs

    def abort_request(self, request_ids: list[str], internal: bool = False) -> None:
        assert internal
        for name in request_ids:
            del self.running[name]


class LLM:
    def __init__(self, engine_args: EngineArgs) -> None:
        if seen := os.environ.get("FAKE_VLLM_SEEN"):
            with Path(seen).open("a") as stream:
                stream.write(json.dumps(vars(engine_args)) + "\n")
        if f"refuse-{engine_args.quantization}" == BEHAVIOUR:
            raise ValueError("no kernel for this quantization")
        assert engine_args.skip_tokenizer_init
        assert not engine_args.enable_prefix_caching
        assert engine_args.max_logprobs == -1
        engine = multiprocessing.get_context("fork").Process(target=int)  # as vLLM's own starts
        engine.start()
        engine.join(5)
        assert engine.exitcode == 0, "the engine's process did not come up"
        self.args, self.llm_engine = engine_args, Engine(engine_args)

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> LLM:
        return cls(engine_args)

    def generate(
        self,
        prompts: list[dict[str, Any]],
        sampling_params: SamplingParams | Sequence[SamplingParams],
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        assert not self.llm_engine.running, "a request is still running"
        given = sampling_params
        each = [given] * len(prompts) if isinstance(given, SamplingParams) else list(given)
        assert all(params.temperature == 0.0 and params.ignore_eos for params in each)
        return [
            self._one(list(prompt["prompt_token_ids"]), params)
            for prompt, params in zip(prompts, each, strict=True)
        ]

    def _one(self, prompt: list[int], params: SamplingParams) -> RequestOutput:
        tokens = list(prompt)
        for _ in range(params.max_tokens):
            tokens.append(next_token(tokens))
            if tokens[-1] in params.stop_token_ids:
                break
        new = tokens[len(prompt) :]
        output = RequestOutput(outputs=[Completion(new)])
        if not self.args.disable_log_stats:
            output.metrics = Stats(num_generation_tokens=len(new))
        if params.prompt_logprobs == -1:
            output.prompt_logprobs = FlatLogprobs()
            output.prompt_logprobs.add(None, 0)
            for end in range(1, len(prompt)):
                output.prompt_logprobs.add(next_token(prompt[:end]), prompt[end])
            output.outputs[0].logprobs = FlatLogprobs()
            output.outputs[0].logprobs.add(next_token(prompt), tokens[len(prompt)])
        return output
