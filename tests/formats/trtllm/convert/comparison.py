"""Transformers running a unified checkpoint, and how it is compared with the reference."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    Logits = Callable[[torch.Tensor], torch.Tensor]

PROMPT_LENGTHS = (5, 17, 80)
"""The last is beyond the windows and the original contexts of the tiny models (24 and 64)."""
LOGIT_BOUND = 1e-4
"""Largest difference of a logit without rounding of activations. Logits have a deviation of 1.2 to
1.3; both sides compute in float32 but in another order, and differ by 1.6e-5 at most (measured
2026-11-25)."""
ROUNDED_BOUND = 0.06
"""Root mean square of the difference over the logits' deviation, activations rounded. Equal to the
bit for short prompts; for long ones a last bit flips an E4M3 code here and there, and 0.035 comes
of it. An activation scale that is 10 % off gives 0.095 or more (measured 2026-11-25)."""


def prompts() -> list[torch.Tensor]:
    """Token ids, the same each time."""
    import torch

    return [
        torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(length))
        for length in PROMPT_LENGTHS
    ]


@cache
def transformers_logits(unified: Path, *, round_activations: bool) -> Logits:
    """Logits [S, V] of ids [S] by the Transformers model with the checkpoint's weights.

    Loaded once for each folder: many cases damage a copy of one conversion.
    """
    from pipeline.quant.simulate import load_simulation

    model = load_simulation(unified)
    if not round_activations:
        for module in model.modules():
            module.__dict__.pop("forward", None)  # the rounding that the simulation put there

    def logits(ids: torch.Tensor) -> torch.Tensor:
        import torch

        with torch.no_grad():
            found: torch.Tensor = model(ids[None], use_cache=False).logits[0]
        return found

    return logits


def largest_difference(one: Logits, other: Logits) -> float:
    """Over all prompts and positions."""
    return max(float((one(ids) - other(ids)).abs().max()) for ids in prompts())


def relative_difference(one: Logits, other: Logits) -> float:
    """Root mean square of the difference over the deviation, of the worst prompt."""
    return max(
        float((one(ids) - (wanted := other(ids))).pow(2).mean().sqrt() / wanted.std())
        for ids in prompts()
    )
