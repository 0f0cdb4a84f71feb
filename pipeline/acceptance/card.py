"""Holds a card for one measurement: alone, and with its state before and after."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from pipeline.acceptance.conditions import (
    Conditions,
    condition_findings,
    disturbance,
    gpu_lock,
    read_conditions,
)
from pipeline.core.errors import IncompatibleError
from pipeline.core.hardware import card_name
from pipeline.core.values import Finding

_SETTLE_S = 15.0
"""A process that has ended may still be in NVML's list for a moment, and its work in the
utilization; seen on an H100: below 2 s."""


@dataclass
class HeldCard:
    """A card while it is held.

    Attributes:
        before: Its state before anything ran.
        after: Its state when everything of ours had ended; None until then.
    """

    before: Conditions
    after: Conditions | None = field(default=None)

    @property
    def card(self) -> str:
        """As recipes call it: NVML's name, spaces as dashes."""
        return card_name(self.before.gpu)

    def findings(self) -> tuple[Finding, ...]:
        """What the conditions say about the measurement."""
        return () if self.after is None else condition_findings(self.before, self.after)


@contextlib.contextmanager
def held_card() -> Iterator[HeldCard]:
    """Wait for the card, hold it, and note its state at both ends.

    Raises:
        IncompatibleError: There is none.
    """
    seen = read_conditions()
    if seen is None:
        raise IncompatibleError("no CUDA device: NVML shows this process none; see nvidia-smi")
    with gpu_lock(seen.uuid):
        held = HeldCard(before=_settled())
        yield held
        held.after = _settled()


def _settled() -> Conditions:
    """The card's state, once processes that have just ended are gone from what NVML shows."""
    deadline = time.monotonic() + _SETTLE_S
    while True:
        found = read_conditions()
        if found is None:
            raise IncompatibleError("the CUDA device is gone; see nvidia-smi and dmesg")
        if disturbance(found) is None or time.monotonic() > deadline:
            return found
        time.sleep(0.2)
