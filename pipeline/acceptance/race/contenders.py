"""Who takes part: what can be opened on a card, and whether two of them fit on it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipeline.runners.session import Session

OURS = "ours"
"""Name of the contender that every other one is raced against."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How a slow contender is kept within the time.

    Attributes:
        max_rounds: Most rounds of a pair with it; None for as many as were asked.
        warm_up_osl: Output tokens of its warm-up; None for the workload's own.
    """

    max_rounds: int | None = None
    warm_up_osl: int | None = None


class Contender(Protocol):
    """A model in a runtime."""

    @property
    def name(self) -> str:
        """Short name, for `--only` and the journal."""
        ...

    @property
    def label(self) -> str:
        """What it is, for people."""
        ...

    @property
    def arguments(self) -> tuple[str, ...]:
        """How the runtime is started, for the report."""
        ...

    @property
    def memory_bytes(self) -> int:
        """Device memory that it needs at most, estimated; 0 where it needs none."""
        ...

    @property
    def pace(self) -> Pace: ...

    def open(self, log_path: Path) -> AbstractContextManager[Session]:
        """Load it; leaving the context frees what it holds. `log_path` gets its output.

        Raises:
            PipelineError: It did not load.
        """
        ...


def fit_fault(ours: Contender, peer: Contender, free_bytes: int | None) -> str | None:
    """Why two contenders cannot be loaded beside each other; None when they can.

    Args:
        ours: The one that stays loaded.
        peer: The one that comes beside it.
        free_bytes: Device memory that is free without both; None without a device.
    """
    needed = ours.memory_bytes + peer.memory_bytes
    if free_bytes is None or needed <= free_bytes:
        return None
    return (
        f"{ours.name} and {peer.name} need about {needed / 1e9:.1f} GB together "
        f"({ours.memory_bytes / 1e9:.1f} and {peer.memory_bytes / 1e9:.1f}), "
        f"{free_bytes / 1e9:.1f} GB of the card are free; take smaller batches (--workloads) or "
        "shorter ones (--isl, --osl), or a card with more memory"
    )
