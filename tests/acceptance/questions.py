"""What the tests ask of an engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.acceptance.acceptance import Acceptance
from pipeline.acceptance.speed import SpeedSample, measure_speed
from pipeline.runners.runner import Session
from pipeline.runners.workload import Workload
from pipeline.sources.text.topics import PydocTopics


class Stub:
    """A session of which a test uses one part."""

    def logits(self, tokens: Any) -> Any:
        raise NotImplementedError

    def generate(self, prompts: Any, osl: int, options: Any = None) -> Any:
        raise NotImplementedError

    def stream(self, prompt: Any, max_new_tokens: int, eos_token_ids: Any) -> Any:
        raise NotImplementedError


def acceptance(**changes: Any) -> Acceptance:
    """Little text and no targets; limits as a recipe may have them."""
    given: dict[str, Any] = {
        "targets": (), "text": PydocTopics(part="judge"), "windows": 4, "reference_windows": 2,
        "window_tokens": 64, "max_perplexity_increase": 0.01, "max_mean_kl_nats": 0.06,
        "min_top1_agreement": 0.85, "repeats": 3, "time_limit_s": 600.0, "seed": 0,
    }  # fmt: skip
    return Acceptance(**{**given, **changes})


def speed_of(
    workload: Workload,
    contenders: Mapping[str, Session],
    *,
    vocab_size: int,
    repeats: int,
    seed: int = 0,
    eos_token_ids: frozenset[int] = frozenset(),
) -> dict[str, list[SpeedSample]]:
    """The runs of a workload with synthetic prompts."""
    waves = workload.waves(workload.request_prompts(vocab_size, seed), seed, eos_token_ids)
    return measure_speed(workload, contenders, waves, repeats)
