"""Answers as `pynvml` gives them on a machine with some cards."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

CONSTANTS = {
    f"NVML_{name}": 0
    for name in (
        *("CLOCK_SM", "CLOCK_MEM", "TEMPERATURE_GPU"),
        *("MEMORY_ERROR_TYPE_UNCORRECTED", "VOLATILE_ECC"),
    )
}


class NVMLError(Exception):
    pass


@dataclass
class Card:
    name: str = "NVIDIA GeForce RTX 4090"
    sm: tuple[int, int] = (8, 9)
    free: int = 20 << 30
    mig: bool = False
    uuid: str = ""


def nvml(*cards: Card, fault: str = "", driver: str = "580.65.06") -> Any:
    """What stands for the module; with `fault` it does not start."""

    def by_index(index: int) -> Card:
        if index >= len(cards):
            raise NVMLError("Invalid Argument")
        return cards[index]

    def by_uuid(uuid: str) -> Card:
        if not uuid.startswith("GPU-"):
            raise NVMLError("Not Found")
        return by_index(int(uuid.removeprefix("GPU-")))

    def mig(card: Card) -> tuple[int, int]:
        if "4090" in card.name:
            raise NVMLError("Not Supported")
        return int(card.mig), 0

    def init() -> None:
        if fault:
            raise NVMLError(fault)

    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=init,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: len(cards),
        nvmlDeviceGetHandleByIndex=by_index,
        nvmlDeviceGetHandleByUUID=by_uuid,
        nvmlDeviceGetName=lambda card: card.name,
        nvmlDeviceGetUUID=lambda card: card.uuid,
        nvmlDeviceGetMigMode=mig,
        nvmlDeviceGetCudaComputeCapability=lambda card: card.sm,
        nvmlDeviceGetMemoryInfo=lambda card: SimpleNamespace(
            free=card.free, used=1 << 30, total=24 << 30
        ),
        nvmlDeviceGetComputeRunningProcesses=lambda card: [],
        nvmlSystemGetDriverVersion=lambda: driver,
        nvmlSystemGetCudaDriverVersion_v2=lambda: 13000,
        **CONSTANTS,
    )
