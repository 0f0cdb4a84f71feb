"""A machine with a card, as far as one without has it: what NVML says, and what runs an engine.

NVML is a module of that name on the path of the processes that are to see the card. The runner
computes on the CPU and says that it was the card. All else is the real code.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from pydantic.dataclasses import dataclass

from pipeline.core.settings import STRICT
from pipeline.core.values import Engine
from pipeline.runners.runner import BATCHES, Ability, Device, Session
from pipeline.runners.transformers import open_checkpoint

_NVML = """\
import sys

from tests.nvml import Card, nvml

sys.modules[__name__] = nvml(Card(name={name!r}, sm={capability}, uuid="GPU-stand-in"))
"""
_KIND = f"from {__name__} import CardRunner\n\nKIND = CardRunner\n"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CardRunner:
    """Runs a checkpoint as a simulation and says that it was on the card."""

    @property
    def name(self) -> str:
        return "vllm"

    @property
    def device(self) -> Device:
        return "cuda"

    @property
    def abilities(self) -> frozenset[Ability]:
        return BATCHES

    def why_not(self, engine: Engine) -> str | None:
        return None

    def open(self, engine: Engine) -> AbstractContextManager[Session]:
        return open_checkpoint(engine.dir, engine.limits.max_seq_len)


def put_card(folder: Path, name: str, capability: tuple[int, int]) -> Path:
    """Write the module that stands for NVML; the folder goes first on PYTHONPATH.

    Args:
        folder: Made.
        name: As NVML calls the card.
        capability: Its compute capability.
    """
    folder.mkdir()
    (folder / "pynvml.py").write_text(_NVML.format(name=name, capability=capability))
    return folder


def put_runner(folder: Path, recipes: Path) -> str:
    """Write the runner, below a folder of `put_card`, and its option; the override that chooses it.

    `tests.warm` adds `runners/` of what is on PYTHONPATH to the room of runners.
    """
    (folder / "runners").mkdir()
    (folder / "runners" / "on_card.py").write_text(_KIND)
    (recipes / "runner").mkdir()
    (recipes / "runner" / "on_card.yaml").write_text("kind: on_card\n")
    return "runner=on_card"
