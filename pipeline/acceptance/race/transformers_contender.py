"""Hugging Face's own `generate`, the slow baseline, in a process that ends with the session."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.acceptance.race.contenders import Pace
from pipeline.acceptance.race.vllm_contenders import weight_bytes
from pipeline.model.spec import ModelSpec
from pipeline.runners.child_session import module_program
from pipeline.runners.session import Demands, Device, Generation, Session
from pipeline.runners.vllm.process import Child, generate_request, running_child
from pipeline.runners.vllm.session import Timeouts
from pipeline.runners.workload import Workload

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TRANSFORMERS = "transformers"
MAX_ROUNDS = 3
"""A round of Phi-3-mini's shape at batches 1 to 128 takes over a minute (71 s by the rates of an
H200, 2026-11-24), and the ratio is so large that its second digit does not matter."""
WARM_UP_OSL = 16
"""Nothing is compiled: the first tokens load all kernels."""
OVERHEAD_BYTES = 4 << 30
"""CUDA context, activations and logits of the largest batch; an estimate."""
_CACHE_COPIES = 2
"""Its cache grows by concatenation, so the old one lives while the new one is made, and the
allocator keeps what was freed."""


@dataclass(frozen=True, kw_only=True)
class TransformersContender:
    """A source model in Transformers; see `pipeline.acceptance.race.contenders.Contender`.

    Attributes:
        weights_dir: The source model.
        memory_bytes: Device memory, estimated.
        timeouts: How long to wait for it.
        device: `cuda` in bfloat16, `cpu` in float32.
    """

    weights_dir: Path
    memory_bytes: int
    timeouts: Timeouts
    device: Device = "cuda"

    @property
    def name(self) -> str:
        return TRANSFORMERS

    @property
    def label(self) -> str:
        return f"Hugging Face generate, {'float32' if self.device == 'cpu' else 'bfloat16'}"

    @property
    def arguments(self) -> tuple[str, ...]:
        return (str(self.weights_dir), self.device)

    @property
    def pace(self) -> Pace:
        return Pace(max_rounds=MAX_ROUNDS, warm_up_osl=WARM_UP_OSL)

    def open(self, log_path: Path) -> AbstractContextManager[Session]:
        return _open(self.arguments, self.timeouts, log_path)


def transformers_memory_bytes(
    weights_dir: Path, shape: ModelSpec, workloads: Sequence[Workload]
) -> int:
    """Weights, a 16-bit cache for the largest workload, and what comes beside them."""
    tokens = max(load.batch * (load.isl + load.osl) for load in workloads)
    cache = _CACHE_COPIES * shape.kv_bytes(tokens, 2)
    return weight_bytes(weights_dir) + cache + OVERHEAD_BYTES


class _ProcessSession:
    """The part of a `Session` that a race needs."""

    def __init__(self, child: Child, timeouts: Timeouts) -> None:
        self._child = child
        self._answer_s = timeouts.answer_s

    def generate(
        self, prompts: Sequence[Sequence[int]], osl: int, demands: Demands | None = None
    ) -> Generation:
        """As the Protocol says; prompts must be equally long, so that no padding is timed.

        Raises:
            ToolError: The process ended or hangs.
            PipelineError: Transformers refuses the request.
        """
        import numpy as np

        self._child.send(generate_request(prompts, osl, demands))
        answer = self._child.receive(self._answer_s, "runner.answer_timeout_s")
        return Generation(
            tokens=np.array(answer["tokens"], np.int64),
            ttft_s=float(answer["ttft_s"]),
            total_s=float(answer["total_s"]),
        )

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        raise NotImplementedError("a race asks for no logits")

    def stream(
        self, prompt: Sequence[int], max_new_tokens: int, eos_token_ids: frozenset[int]
    ) -> Iterator[int]:
        raise NotImplementedError("a race asks for no streams")


@contextlib.contextmanager
def _open(
    arguments: Sequence[str], timeouts: Timeouts, log_path: Path
) -> Iterator[_ProcessSession]:
    program = module_program("Transformers", "pipeline.acceptance.race.transformers_child")
    with running_child(arguments, program=program, log_path=log_path) as child:
        child.receive(timeouts.load_s, "runner.load_timeout_s")
        yield _ProcessSession(child, timeouts)
