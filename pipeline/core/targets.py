"""Which `conf/target/<id>.yaml` is this card."""

from __future__ import annotations

from pipeline.core.data import data_dir, shipped
from pipeline.core.hardware import Target


def target_of_card(card: str) -> Target | None:
    """The target with this name of the card, such as `NVIDIA-H100-80GB-HBM3`; None for none."""
    return next((target for target in known_targets() if target.card == card), None)


def known_targets() -> tuple[Target, ...]:
    """All cards that we know figures of, by id."""
    options = sorted((data_dir("conf") / "target").glob("*.yaml"))
    return tuple(Target(**shipped(f"target/{path.stem}")) for path in options)
