"""Stands in for vLLM 0.24 in tests: what `child.py` calls, with arithmetic for a model.

`$FAKE_VLLM` makes it misbehave: see `_misbehave` and the places that ask for it. `$FAKE_VLLM_SEEN`
is a file that gets the arguments of every engine, one JSON line each.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VOCAB = 320
BEHAVIOUR = os.environ.get("FAKE_VLLM", "")


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
    output_kind: str = "cumulative"


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
            if BEHAVIOUR == "nan":
                values[actual] = float("nan")
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


def _misbehave(where: str) -> None:
    print("vLLM prints to standard output", where)
    fault, _, place = BEHAVIOUR.partition("-")
    if place != where:
        return
    if fault == "crash":
        print("no more memory", file=sys.stderr)
        sys.stderr.flush()
        os._exit(17)
    if fault == "hang":
        time.sleep(600)
    if fault == "raise":
        raise ValueError("longer than the context")


class Engine:
    """Streams one token a step."""

    def __init__(self) -> None:
        self.active: tuple[list[int], SamplingParams] | None = None
        self.sent = 0

    def add_request(self, name: str, prompt: dict[str, Any], params: SamplingParams) -> str:
        assert self.active is None, "a request is still running"
        assert params.output_kind == "delta"
        self.active, self.sent = (list(prompt["prompt_token_ids"]), params), 0
        return f"{name}-internal"

    def step(self) -> list[RequestOutput]:
        assert self.active is not None
        if self.sent == 2:
            _misbehave("stream")
        time.sleep(0.002)
        if self.sent > 2000:
            os._exit(18)  # a stream that its caller has left goes on
        tokens, params = self.active
        tokens.append(next_token(tokens))
        self.sent += 1
        ended = self.sent == params.max_tokens or tokens[-1] in params.stop_token_ids
        if ended:
            self.active = None
        return [RequestOutput(outputs=[Completion([tokens[-1]])], finished=ended)]

    def abort_request(self, names: list[str], internal: bool) -> None:
        assert internal
        assert all(name.endswith("-internal") for name in names)
        self.active = None


class LLM:
    def __init__(self, engine_args: EngineArgs) -> None:
        _misbehave("load")
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
        self.args, self.llm_engine = engine_args, Engine()

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> LLM:
        return cls(engine_args)

    def generate(
        self, prompts: list[dict[str, Any]], params: SamplingParams, use_tqdm: bool
    ) -> list[RequestOutput]:
        _misbehave("generate")
        assert params.temperature == 0.0
        assert params.ignore_eos
        return [self._one(list(prompt["prompt_token_ids"]), params) for prompt in prompts]

    def _one(self, prompt: list[int], params: SamplingParams) -> RequestOutput:
        tokens = list(prompt)
        for _ in range(params.max_tokens - (BEHAVIOUR == "short")):
            tokens.append(next_token(tokens))
        new = tokens[len(prompt) :]
        output = RequestOutput(outputs=[Completion(new)])
        if not self.args.disable_log_stats:
            output.metrics = Stats(num_generation_tokens=len(new))
        if params.prompt_logprobs == -1:
            output.prompt_logprobs = FlatLogprobs()
            output.prompt_logprobs.add(None, 0)
            skipped = 1 if BEHAVIOUR == "rows" else 0
            for end in range(1 + skipped, len(prompt)):
                output.prompt_logprobs.add(next_token(prompt[:end]), prompt[end])
            output.outputs[0].logprobs = FlatLogprobs()
            output.outputs[0].logprobs.add(next_token(prompt), tokens[len(prompt)])
        return output
