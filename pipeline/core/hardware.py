"""Cards that engines are built for: the numbers that fit and ceilings follow from."""

from __future__ import annotations

from pydantic import PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from pipeline.core.settings import STRICT

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Target:
    """A GPU model; `conf/target/<id>.yaml` holds one each.

    Attributes:
        id: Short name used in variants and on the command line, such as `rtx4090`.
        card: What NVML calls it, spaces as dashes: `NVIDIA-GeForce-RTX-4090`.
        sm: Compute capability x 10 (89 = Ada).
        memory_gib: Device memory as NVML reports it, GiB, rounded down: what can be allocated is a
            little less than what is sold, and 6 % less on GDDR6 cards with ECC on.
        bandwidth_gb_s: Peak memory bandwidth, 10^9 bytes/s.
        fp16_tflops: Dense FP16 tensor peak with FP32 accumulation, 10^12 FLOP/s.
        fp8_tflops: Dense FP8 tensor peak with FP32 accumulation; None where there is no FP8.
        power_w: Board power limit as sold.
        source: Where the numbers come from.
    """

    id: str
    card: str
    sm: PositiveInt
    memory_gib: PositiveFloat
    bandwidth_gb_s: PositiveFloat
    fp16_tflops: PositiveFloat
    fp8_tflops: PositiveFloat | None
    power_w: PositiveInt
    source: str

    @property
    def memory_bytes(self) -> int:
        """Device memory in bytes."""
        return int(self.memory_gib * GIB)


def card_name(gpu: str) -> str:
    """A card as targets spell it, of what NVML calls it: spaces as dashes."""
    return gpu.replace(" ", "-")
