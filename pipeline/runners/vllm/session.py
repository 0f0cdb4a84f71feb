"""A session on a model that vLLM holds in another process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import CorruptError, PipelineError
from pipeline.runners.session import UNUSED_TOKEN, Demands
from pipeline.runners.vllm.process import Child, generate_request, running_child, stream_tokens
from pipeline.runners.vllm.timing import RequestTiming, VllmGeneration

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_LOAD, _ANSWER = "runner.load_timeout_s", "runner.answer_timeout_s"


@dataclass(frozen=True, kw_only=True)
class Timeouts:
    """After so long without a word the process is stopped.

    Attributes:
        load_s: For loading, compilation included.
        answer_s: For an answer, or the next token of a stream.
    """

    load_s: float
    answer_s: float


class VllmSession:
    """`pipeline.runners.session.Session` on vLLM; greedy, token ids in and out."""

    def __init__(self, child: Child, timeouts: Timeouts) -> None:
        self._child = child
        self._answer_s = timeouts.answer_s

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Log-probabilities [tokens, vocab]: the logits less a constant of each position.

        Softmax, perplexity, KL divergence and the most likely token are the same of both. One
        token is generated for the last row, so `tokens` must be shorter than `--max-model-len`.

        Raises:
            CorruptError: A value is not finite.
            ToolError: The process ended or hangs.
            PipelineError: vLLM refuses the request, or gives another number of rows.
        """
        import numpy as np

        self._child.send({"kind": "logits", "tokens": list(tokens)})
        answer = self._receive()
        data = self._child.receive_bytes(answer["size_bytes"], self._answer_s, _ANSWER)
        values = np.frombuffer(data, "<f4").reshape(answer["shape"])
        if len(values) != len(tokens):
            raise self._short(f"the logits of {len(tokens)} positions", f"{len(values)}")
        if not np.isfinite(values).all():
            bad = int((~np.isfinite(values).all(axis=1)).sum())
            raise CorruptError(
                f"vLLM gave logits that are not finite at {bad} of {len(values)} positions; the "
                "checkpoint cannot be judged: check the calibration's outliers and "
                f"quantizer.keep_16bit; see {self._child.log_path}"
            )
        return values

    def generate(
        self, prompts: Sequence[Sequence[int]], osl: int, demands: Demands | None = None
    ) -> VllmGeneration:
        """As the Protocol says; prompts may differ in length, and requests may arrive one by one.

        Raises:
            CorruptError: vLLM saw logits that are not a number; it looks only where its variable
                VLLM_COMPUTE_NANS_IN_LOGITS=1 is set, which costs speed.
            ToolError: The process ended or hangs.
            PipelineError: vLLM refuses the request, or gives too few tokens.
        """
        import numpy as np

        self._child.send(generate_request(prompts, osl, demands))
        # The last request cannot be answered before it arrives.
        arriving_s = max(demands.arrivals_s, default=0.0) if demands else 0.0
        answer = self._child.receive(self._answer_s + arriving_s, _ANSWER)
        made: list[list[int]] = answer["tokens"]
        self._require_asked(made, len(prompts), osl, demands)
        metrics = answer["requests"]
        if None in metrics:
            raise PipelineError(
                "vLLM gave no times of its requests; remove --disable-log-stats from "
                "runner.arguments and from the package's serve arguments"
            )
        if any(found["corrupted"] for found in metrics):
            raise CorruptError(
                "vLLM saw logits that are not a number while it generated; the checkpoint cannot "
                f"be judged; see {self._child.log_path}"
            )
        arrivals = demands.arrivals_s if demands else ()
        requests = tuple(
            RequestTiming.of(found, arrivals[place] if arrivals else None)
            for place, found in enumerate(metrics)
        )
        lengths = tuple(len(row) for row in made)
        tokens = np.full((len(made), max(lengths)), UNUSED_TOKEN, np.int64)
        for row, answered in zip(tokens, made, strict=True):
            row[: len(answered)] = answered
        return VllmGeneration(
            tokens=tokens,
            ttft_s=max(request.ttft_ms for request in requests) / 1e3,
            total_s=float(answer["total_s"]),
            lengths=None if demands is None else lengths,
            requests=requests,
        )

    def _require_asked(
        self, made: list[list[int]], count: int, osl: int, demands: Demands | None
    ) -> None:
        """Refuse answers that are neither as long as asked nor ended by end-of-sequence."""
        each = demands.osl_each if demands else (osl,) * count
        eos = demands.eos_token_ids if demands else frozenset[int]()
        lengths = sorted({len(row) for row in made})
        if len(made) == count and all(
            len(row) == limit or (0 < len(row) < limit and row[-1] in eos)
            for row, limit in zip(made, each, strict=True)
        ):
            return
        asked = f"{osl} tokens each" if min(each) == osl else f"{min(each)} to {osl} tokens"
        raise self._short(
            f"{count} requests of {asked}",
            f"{len(made)} of {' or '.join(map(str, lengths))}",
        )

    def stream(
        self, prompt: Sequence[int], max_new_tokens: int, eos_token_ids: frozenset[int]
    ) -> Iterator[int]:
        return stream_tokens(self._child, self._receive, prompt, max_new_tokens, eos_token_ids)

    def _receive(self) -> dict[str, Any]:
        return self._child.receive(self._answer_s, _ANSWER)

    def _short(self, wanted: str, got: str) -> PipelineError:
        return PipelineError(f"asked vLLM for {wanted}, got {got}; see {self._child.log_path}")


@contextlib.contextmanager
def open_session(
    arguments: Sequence[str], timeouts: Timeouts, log_path: Path | None = None
) -> Iterator[VllmSession]:
    """Load a model; leaving the context ends the process that holds it.

    Args:
        arguments: Of vLLM's engine, `--model FOLDER` among them.
        timeouts: How long to wait.
        log_path: Where vLLM's log stays; None for a temporary one.

    Raises:
        ToolError: The process ended or hangs.
    """
    with running_child(arguments, log_path=log_path) as child:
        child.receive(timeouts.load_s, _LOAD)
        yield VllmSession(child, timeouts)


def engine_arguments(
    model_dir: Path, serve_args: Sequence[str], more: Sequence[str]
) -> tuple[str, ...]:
    """Arguments of vLLM's engine for a measurement.

    The package's own come first. What follows changes nothing that is computed: no tokenizer is
    needed for token ids, a prefix that is cached would not be computed and so not be measured, and
    all log-probabilities may be asked for.
    """
    return (
        *("--model", str(model_dir)),
        *serve_args,
        "--skip-tokenizer-init",
        "--no-enable-prefix-caching",
        "--max-logprobs=-1",
        *more,
    )
