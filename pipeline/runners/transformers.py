"""Executes a model with Transformers on a CPU: the source, and the simulated FP8 checkpoint.

The slow baseline that an engine is compared with, and the reference for its quality.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic.dataclasses import dataclass

from pipeline.convert.simulate import load_simulation
from pipeline.errors import IncompatibleError
from pipeline.hf import load_model, quiet
from pipeline.runners.session import Device, Generation, Session
from pipeline.settings import STRICT
from pipeline.stages import Engine

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray


class TransformersSession:
    """`pipeline.runners.session.Session` on a Transformers model in float32."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        import torch

        with torch.inference_mode():
            output = self._model(torch.tensor([list(tokens)]), use_cache=False)
        result: NDArray[np.float32] = output.logits[0].float().numpy()
        return result

    def generate(self, prompts: Sequence[Sequence[int]], osl: int) -> Generation:
        """As the Protocol says; prompts must be equally long, so that no padding is timed."""
        import torch
        from transformers import StoppingCriteriaList

        ids = torch.tensor([list(prompt) for prompt in prompts])
        token_times: list[float] = []

        def note_time(tokens: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
            """A stopping criterion that never stops; called after each token of the batch."""
            token_times.append(time.perf_counter())
            return torch.zeros(len(tokens), dtype=torch.bool)

        started = time.perf_counter()
        with quiet(), torch.inference_mode():
            made = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=osl,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([note_time]),
            )
        ended = time.perf_counter()
        return Generation(
            tokens=made[:, ids.shape[1] :].numpy(),
            ttft_s=token_times[0] - started,
            total_s=ended - started,
        )

    def stream(
        self, prompt: Sequence[int], max_new_tokens: int, eos_token_ids: frozenset[int]
    ) -> Iterator[int]:
        import torch

        ids = torch.tensor([list(prompt)])
        cache = None
        with torch.inference_mode():
            for _ in range(max_new_tokens):
                output = self._model(ids, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                token = int(output.logits[0, -1].argmax())
                if token in eos_token_ids:
                    return
                yield token
                ids = torch.tensor([[token]])


@contextlib.contextmanager
def open_source(weights_dir: Path) -> Iterator[TransformersSession]:
    """The source model, computed in float32."""
    yield TransformersSession(load_model(weights_dir, "float32"))


@contextlib.contextmanager
def open_checkpoint(checkpoint_dir: Path, context: int) -> Iterator[TransformersSession]:
    """An FP8 checkpoint, simulated in float32; `context`: longest request, tokens."""
    yield TransformersSession(load_simulation(checkpoint_dir, context=context))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TransformersRunner:
    """Runs a checkpoint engine as a float32 simulation of its FP8 linears."""

    @property
    def name(self) -> str:
        return "transformers"

    @property
    def device(self) -> Device:
        return "cpu"

    def why_not(self, engine: Engine) -> str | None:
        if engine.format != "checkpoint":
            return f"runner=transformers simulates checkpoint engines, not {engine.format}"
        return None

    def open(self, engine: Engine) -> AbstractContextManager[Session]:
        if reason := self.why_not(engine):
            raise IncompatibleError(reason)
        return open_checkpoint(engine.dir, engine.limits.max_seq_len)
