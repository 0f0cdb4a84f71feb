"""The simulation of a checkpoint in a process of its own, whose device memory ends with it.

    python -P -m pipeline.runners.transformers_process CHECKPOINT CONTEXT cuda

The process speaks as `pipeline/runners/vllm/child.py` does, whose channel it uses.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from pipeline.runners.child_session import ChildSession, module_program, ready_child
from pipeline.runners.session import Demands, Device
from pipeline.runners.vllm.child import serve_standard_streams
from pipeline.runners.vllm.session import Timeouts

_NAME = "Transformers"


class TransformersProcessSession(ChildSession):
    """`pipeline.runners.session.Session` on a simulation in another process."""

    def clear_cache(self) -> None:
        """Give back what PyTorch's allocator keeps of freed memory there."""
        self._child.send({"kind": "clear_cache"})
        self._receive()


@contextlib.contextmanager
def open_process(
    checkpoint_dir: Path, context: int, device: Device, timeouts: Timeouts
) -> Iterator[TransformersProcessSession]:
    """Load a checkpoint's simulation; leaving the context ends the process that holds it.

    Args:
        checkpoint_dir: Unified FP8 checkpoint.
        context: Longest request, tokens.
        device: Where it computes, in float32.
        timeouts: How long to wait.

    Raises:
        ToolError: The process ended or hangs.
        PipelineError: It cannot load.
    """
    program = module_program(_NAME, __name__)
    with ready_child((str(checkpoint_dir), str(context), device), timeouts, program) as child:
        yield TransformersProcessSession(child, timeouts, _NAME)


class SimulationModel:
    """`pipeline.runners.vllm.child.Model` on a simulation."""

    def __init__(self, checkpoint_dir: Path, context: int, device: Device) -> None:
        from pipeline.quant.simulate import load_simulation
        from pipeline.runners.transformers import TransformersSession

        model = load_simulation(checkpoint_dir, context=context).to(device)
        self._session = TransformersSession(model, device)

    def logits(self, tokens: Sequence[int]) -> tuple[tuple[int, int], bytes]:
        values = self._session.logits(tokens)
        return (len(values), values.shape[1]), values.astype("<f4").tobytes()

    def generate(
        self, prompts: Sequence[Sequence[int]], osl: int, demands: Mapping[str, Any]
    ) -> dict[str, Any]:
        made = self._session.generate(prompts, osl, Demands.of(demands))
        return {
            "tokens": made.tokens.tolist(),
            "ttft_s": made.ttft_s,
            "total_s": made.total_s,
            "lengths": made.lengths,
        }

    def stream(
        self, prompt: Sequence[int], max_new_tokens: int, stop: Sequence[int]
    ) -> Iterator[int]:
        yield from self._session.stream(prompt, max_new_tokens, frozenset(stop))

    def clear_cache(self) -> None:
        self._session.clear_cache()


def main(arguments: Sequence[str]) -> None:
    """Load the simulation and serve."""
    folder, context, device = arguments
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    serve_standard_streams(
        lambda: SimulationModel(Path(folder), int(context), cast("Device", device))
    )


if __name__ == "__main__":
    main(sys.argv[1:])
