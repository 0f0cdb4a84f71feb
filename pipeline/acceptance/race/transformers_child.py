"""Holds a model in Transformers and answers `generate` requests on standard input.

    python -P -m pipeline.acceptance.race.transformers_child FOLDER cuda

It speaks as `pipeline/runners/vllm/child.py` does, whose channel it uses; a result has `tokens`,
`ttft_s` and `total_s`. The device is synchronised before the clock starts, at the first token and
before it stops; the tokens are back in the host's memory by then.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.runners.vllm.child import serve_standard_streams


class TransformersModel:
    """A model in bfloat16 on a GPU, or in float32 on a CPU; greedy, end-of-sequence ignored."""

    def __init__(self, folder: Path, device: str) -> None:
        from pipeline.model.hf import load_model

        self._device = device
        self._model = load_model(folder, "float32" if device == "cpu" else "bfloat16").to(device)
        self._model.generation_config.eos_token_id = None

    def generate(
        self, prompts: Sequence[Sequence[int]], osl: int, demands: Mapping[str, Any]
    ) -> dict[str, Any]:
        if demands:
            raise NotImplementedError("a race asks for batches of equal requests")
        import torch
        from transformers import StoppingCriteriaList

        from pipeline.model.hf import quiet

        first: list[float] = []

        def note_time(tokens: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
            """A stopping criterion that never stops; called after each token of the batch."""
            if not first:
                self._synchronize()
                first.append(time.perf_counter())
            return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)

        ids = torch.tensor([list(prompt) for prompt in prompts])
        self._synchronize()
        started = time.perf_counter()
        with quiet(), torch.inference_mode():
            on_device = ids.to(self._device)
            made = self._model.generate(
                on_device,
                attention_mask=torch.ones_like(on_device),
                max_new_tokens=osl,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([note_time]),
            )
            tokens = made[:, ids.shape[1] :].cpu()
        self._synchronize()
        total_s = time.perf_counter() - started
        return {"tokens": tokens.tolist(), "ttft_s": first[0] - started, "total_s": total_s}

    def logits(self, tokens: Sequence[int]) -> tuple[tuple[int, int], bytes]:
        raise NotImplementedError("a race asks for no logits")

    def stream(
        self, prompt: Sequence[int], max_new_tokens: int, stop: Sequence[int]
    ) -> Iterator[int]:
        raise NotImplementedError("a race asks for no streams")

    def _synchronize(self) -> None:
        import torch

        if self._device != "cpu":
            torch.cuda.synchronize()


def main(arguments: Sequence[str]) -> None:
    """Load the model and serve."""
    folder, device = arguments
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    serve_standard_streams(lambda: TransformersModel(Path(folder), device))


if __name__ == "__main__":
    main(sys.argv[1:])
