"""Executes a model with Transformers: the source, and the simulated FP8 checkpoint."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic.dataclasses import dataclass

from pipeline.core.settings import STRICT
from pipeline.core.values import Engine
from pipeline.formats.spec import format_spec
from pipeline.model.hf import load_model, quiet
from pipeline.quant.simulate import load_simulation
from pipeline.runners.child import ChildSession, open_child, session_program
from pipeline.runners.decode import Rows
from pipeline.runners.runner import Ability, Device, Generation, Session, require_fit
from pipeline.runners.workload import BatchOptions

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray


class TransformersSession:
    """`Session` on a Transformers model that is on `device`; `context` None: what it takes."""

    def __init__(self, model: Any, device: Device = "cpu", context: int | None = None) -> None:
        self.context = context
        self._model = model
        self._device = device

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        import torch

        require_fit([tokens], 0, self.context)
        with torch.inference_mode():
            output = self._model(self._ids([tokens]), use_cache=False)
        result: NDArray[np.float32] = output.logits[0].float().cpu().numpy()
        return result

    def generate(
        self, prompts: Sequence[Sequence[int]], osl: int, options: BatchOptions | None = None
    ) -> Generation:
        """Shorter prompts are padded on the left; `abilities` promises no times of such."""
        import torch
        from transformers import StoppingCriteriaList

        require_fit(prompts, osl, self.context)
        missing = [max(map(len, prompts)) - len(prompt) for prompt in prompts]
        padded = zip(missing, prompts, strict=True)
        ids = self._ids([[*[0] * count, *prompt] for count, prompt in padded])
        mask = torch.arange(ids.shape[1]) >= torch.tensor(missing)[:, None]
        rows = Rows(len(prompts), osl, options)
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
                attention_mask=mask.to(ids),
                max_new_tokens=osl,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([note_time]),
            )
            tokens = made[:, ids.shape[1] :].cpu().numpy()
        return rows.generation(tokens, started, token_times[0], time.perf_counter())

    def stream(
        self, prompt: Sequence[int], max_new_tokens: int, eos_token_ids: frozenset[int]
    ) -> Iterator[int]:
        import torch

        require_fit([prompt], 1, self.context)
        room = max_new_tokens
        if self.context is not None:
            room = min(room, self.context - len(prompt))
        ids, cache = self._ids([prompt]), None
        with torch.inference_mode():
            for _ in range(room):
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
def open_source(
    weights_dir: Path | str,
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: Device = "cpu",
) -> Iterator[TransformersSession]:
    """The source model in this process."""
    model: Any = load_model(Path(weights_dir), dtype)
    yield TransformersSession(model.to(device), device)


@contextlib.contextmanager
def open_checkpoint(checkpoint_dir: Path | str, context: int) -> Iterator[TransformersSession]:
    """A unified checkpoint, simulated in float32 in this process; `context` in tokens."""
    model = load_simulation(Path(checkpoint_dir), context=context)
    yield TransformersSession(model, context=context)


def open_source_in_child(**arguments: Any) -> AbstractContextManager[ChildSession]:
    """The source model in a process; `arguments` are of `session_program`."""
    return open_child(session_program("Transformers", f"{__name__}:open_source", **arguments))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TransformersRunner:
    """Runs a checkpoint engine as a float32 simulation of its quantized linears, on a CPU."""

    name: ClassVar[str] = "transformers"
    device: ClassVar[Device] = "cpu"
    abilities: ClassVar[frozenset[Ability]] = frozenset()

    def why_not(self, engine: Engine) -> str | None:
        if not format_spec(engine.format).is_checkpoint:
            return f"runner=transformers simulates checkpoints, not {engine.format} engines"
        return None

    def open(self, engine: Engine) -> AbstractContextManager[Session]:
        return open_checkpoint(engine.dir, engine.limits.max_seq_len)


KIND = TransformersRunner
