"""Cards that engines are built for: the numbers that fit and ceilings follow from."""

from __future__ import annotations

from pydantic import PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from pipeline.core.settings import STRICT, data_dir, shipped

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Target:
    """A GPU model; `conf/target/<id>.yaml` holds one each.

    Memory is what NVML reports, rounded down: what can be allocated is a little less than what is
    sold, and 6 % less on GDDR6 cards with ECC on. `tflops` is the dense tensor peak with FP32
    accumulation by operand type: `fp16`, and `fp8` where the card multiplies it.
    """

    id: str  # short name used in variants and on the command line, such as `rtx4090`
    card: str  # what NVML calls it, spaces as dashes: `NVIDIA-GeForce-RTX-4090`
    sm: PositiveInt  # compute capability x 10 (89 = Ada)
    memory_gib: PositiveFloat
    bandwidth_gb_s: PositiveFloat  # peak of the memory, 10^9 bytes/s
    tflops: dict[str, PositiveFloat]  # 10^12 FLOP/s
    power_w: PositiveInt  # board power limit as sold
    source: str  # where the numbers come from

    def __post_init__(self) -> None:
        if "fp16" not in self.tflops:
            raise ValueError(f"tflops has {', '.join(self.tflops) or 'nothing'}; fp16 is needed")

    def flops(self, operands: str) -> float:
        """Tensor peak of an operand type, FLOP/s; `fp16` where the card lacks it."""
        return self.tflops.get(operands, self.tflops["fp16"]) * 1e12

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gib * GIB)


def card_name(gpu: str) -> str:
    """A card as targets spell it, of what NVML calls it: spaces as dashes."""
    return gpu.replace(" ", "-")


def target_of_card(card: str) -> Target | None:
    """The target with this name of the card, such as `NVIDIA-H100-80GB-HBM3`; None for none."""
    return next((target for target in known_targets() if target.card == card), None)


def known_targets() -> tuple[Target, ...]:
    """All cards that we know figures of, by id."""
    options = sorted((data_dir("conf") / "target").glob("*.yaml"))
    return tuple(Target(**shipped(f"target/{path.stem}")) for path in options)
