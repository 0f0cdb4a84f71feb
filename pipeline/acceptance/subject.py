"""What is measured, and what measuring it gave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.core.values import Engine, Finding, Weights
from pipeline.plan import Plan
from pipeline.runners.runner import Runner

_SIMULATIONS = frozenset({"transformers"})
"""Runners that simulate the engine: their answers tell about it, their speed does not."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is measured.

    Attributes:
        engine: The engine.
        package_digest: The sealed package that holds it.
        weights: The source model that it is compared with.
        checkpoint_dir: The unified checkpoint that it was made from; None where only the package
            is at hand.
        plan: What follows from its recipe: shape, card, ceilings.
        runner: What executes it here.
    """

    engine: Engine
    package_digest: str
    weights: Weights
    checkpoint_dir: Path | None
    plan: Plan
    runner: Runner

    @property
    def simulated(self) -> bool:
        """Whether the runner only simulates the engine, on its own card too."""
        return self.runner.name in _SIMULATIONS

    @property
    def speed_not_run(self) -> str:
        """For `not_run`, where it is simulated."""
        return f"speed: runner {self.runner.name} only simulates the engine"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a run gave, as parts of the report.

    Attributes:
        quality: Perplexities, KL, agreement, the sample.
        speed: One entry per workload.
        chat: The chat probe.
        lm_eval: Task -> metric -> value.
        sustained: The sustained run.
        physics: Shares of the card's ceilings.
        findings: What the parts that judge themselves found.
        not_run: What was left out, and why.
    """

    quality: Mapping[str, Any]
    speed: tuple[Mapping[str, Any], ...] = ()
    chat: Mapping[str, Any] = field(default_factory=dict)
    lm_eval: Mapping[str, Any] = field(default_factory=dict)
    sustained: Mapping[str, Any] = field(default_factory=dict)
    physics: Mapping[str, Any] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    not_run: tuple[str, ...] = ()
