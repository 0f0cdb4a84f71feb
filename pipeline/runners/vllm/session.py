"""A session on a model that vLLM holds in another process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import CorruptError, PipelineError
from pipeline.runners.vllm.process import Child, running_child, stream_tokens
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

    def generate(self, prompts: Sequence[Sequence[int]], osl: int) -> VllmGeneration:
        """As the Protocol says; prompts may differ in length.

        Raises:
            CorruptError: vLLM saw logits that are not a number; it looks only where its variable
                VLLM_COMPUTE_NANS_IN_LOGITS=1 is set, which costs speed.
            ToolError: The process ended or hangs.
            PipelineError: vLLM refuses the request, or gives too few tokens.
        """
        import numpy as np

        request = {"kind": "generate", "prompts": [list(p) for p in prompts], "osl": osl}
        self._child.send(request)
        answer = self._receive()
        lengths = sorted({len(row) for row in answer["tokens"]})
        if lengths != [osl] or len(answer["tokens"]) != len(prompts):
            raise self._short(
                f"{len(prompts)} requests of {osl} tokens each",
                f"{len(answer['tokens'])} of {' or '.join(map(str, lengths))}",
            )
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
        requests = tuple(RequestTiming.of(found) for found in metrics)
        return VllmGeneration(
            tokens=np.array(answer["tokens"], np.int64),
            ttft_s=max(request.ttft_ms for request in requests) / 1e3,
            total_s=float(answer["total_s"]),
            requests=requests,
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
