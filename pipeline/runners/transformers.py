"""Executes a model with Transformers: the source, and the simulated FP8 checkpoint.

The slow baseline that an engine is compared with, and the reference for its quality.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import PositiveFloat
from pydantic.dataclasses import dataclass

from pipeline.core.errors import IncompatibleError
from pipeline.core.nvml import read_conditions
from pipeline.core.settings import STRICT
from pipeline.core.values import Engine
from pipeline.model.hf import load_model, quiet
from pipeline.quant.simulate import load_simulation
from pipeline.runners.decode import Rows
from pipeline.runners.session import BATCHES, Ability, Demands, Device, Generation, Session
from pipeline.runners.torch_build import torch_without_cuda
from pipeline.runners.vllm.session import Timeouts

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray


EQUAL_PROMPTS: frozenset[Ability] = BATCHES - {"isl_distribution", "prompts_file"}
"""What `TransformersSession` executes, also as the baseline beside an engine."""


def clear_torch_cache() -> None:
    """Give back what PyTorch's CUDA allocator keeps of freed memory; on a CPU it keeps none."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class TransformersSession:
    """`pipeline.runners.session.Session` on a Transformers model in float32."""

    def __init__(self, model: Any, device: Device = "cpu") -> None:
        """Take a model that is on `device` already."""
        self._model = model
        self._device = device

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        import torch

        with torch.inference_mode():
            output = self._model(self._ids([tokens]), use_cache=False)
        result: NDArray[np.float32] = output.logits[0].float().cpu().numpy()
        return result

    def generate(
        self, prompts: Sequence[Sequence[int]], osl: int, demands: Demands | None = None
    ) -> Generation:
        """As the Protocol says; prompts must be equally long, so that no padding is timed."""
        import torch
        from transformers import StoppingCriteriaList

        ids = self._ids(prompts)
        rows = Rows(len(prompts), osl, demands)
        token_times: list[float] = []

        def note_time(tokens: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
            """A stopping criterion, called after each token of the batch: who has ended."""
            newest = tokens[:, -1].cpu().numpy()  # waits for the card
            token_times.append(time.perf_counter())
            rows.take(newest)
            return torch.from_numpy(rows.ended.copy()).to(tokens.device)

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
            tokens = made[:, ids.shape[1] :].cpu().numpy()
        ended = time.perf_counter()
        return Generation(
            tokens=rows.cut(tokens),
            ttft_s=token_times[0] - started,
            total_s=ended - started,
            lengths=rows.lengths,
        )

    def clear_cache(self) -> None:
        """Give freed memory back: Python's unreachable objects, then the CUDA allocator's cache."""
        clear_torch_cache()

    def stream(
        self, prompt: Sequence[int], max_new_tokens: int, eos_token_ids: frozenset[int]
    ) -> Iterator[int]:
        import torch

        ids = self._ids([prompt])
        cache = None
        with torch.inference_mode():
            for _ in range(max_new_tokens):
                output = self._model(ids, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                token = int(output.logits[0, -1].argmax())
                if token in eos_token_ids:
                    return
                yield token
                ids = self._ids([[token]])

    def _ids(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        import torch

        ids = torch.tensor([list(prompt) for prompt in prompts])
        return ids if self._device == "cpu" else ids.to(self._device)


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
    """Runs a checkpoint engine as a float32 simulation of its FP8 linears.

    It tells about the engine's answers, on a card too; its speed is not the engine's. So what it
    runs is `checked` at best, wherever it runs.

    Attributes:
        device: `cpu`, or `cuda` for a process of its own on this machine's card, whose memory ends
            with it: there a sustained run measures what PyTorch's allocator does. Not run on a
            card yet.
        load_timeout_s: Longest time for loading there.
        answer_timeout_s: Longest time for one answer there, or the next token of a stream.
    """

    device: Device = "cpu"
    load_timeout_s: PositiveFloat = 900.0
    answer_timeout_s: PositiveFloat = 600.0

    @property
    def name(self) -> str:
        return "transformers"

    @property
    def abilities(self) -> frozenset[Ability]:
        return EQUAL_PROMPTS | {"clear_cache"}

    def why_not(self, engine: Engine) -> str | None:
        if engine.format != "checkpoint":
            return f"runner=transformers simulates checkpoint engines, not {engine.format}"
        return _no_cuda() if self.device == "cuda" else None

    def open(self, engine: Engine) -> AbstractContextManager[Session]:
        if reason := self.why_not(engine):
            raise IncompatibleError(reason)
        context = engine.limits.max_seq_len
        if self.device == "cpu":
            return open_checkpoint(engine.dir, context)
        from pipeline.runners.transformers_process import open_process

        timeouts = Timeouts(load_s=self.load_timeout_s, answer_s=self.answer_timeout_s)
        return open_process(engine.dir, context, self.device, timeouts)


def _no_cuda() -> str | None:
    """Why nothing runs on a card here, without importing PyTorch; None when it can."""
    if torch := torch_without_cuda():
        return (
            f"runner.device=cuda needs PyTorch built for CUDA, got {torch}: install one "
            "as https://pytorch.org/get-started says, or leave runner.device out"
        )
    if read_conditions() is None:
        return (
            "runner.device=cuda needs a CUDA device, and NVML shows this process none; see "
            "nvidia-smi, CUDA_VISIBLE_DEVICES and that nvidia-ml-py is installed, or leave "
            "runner.device out"
        )
    return None


KIND = TransformersRunner
