"""The NVIDIA GPUs of this machine, as `nvidia-smi` tells them."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

from pipeline.core.errors import IncompatibleError

_COMMAND = (
    "nvidia-smi",
    "--query-gpu=index,name,compute_cap,memory.total,driver_version,uuid",
    "--format=csv,noheader,nounits",
)
_TIMEOUT_S = 60.0  # without persistence mode the first call takes seconds for each card

_WAYS_ON = {
    "Driver/library version mismatch": "the driver was updated while it was loaded; reboot",
    "couldn't communicate with the NVIDIA driver": "install the NVIDIA driver, or load it (sudo "
    "modprobe nvidia); in a container, start that one with docker run --gpus all",
    "not a valid field to query": "the driver is too old to tell its compute capability; install "
    "a newer one",
    "No devices were found": "the driver runs but sees no card; see dmesg",
}
"""By what nvidia-smi prints."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One card.

    Attributes:
        index: Number of the card in nvidia-smi, which is not always CUDA's.
        name: Such as `NVIDIA GeForce RTX 4090`.
        sm: Compute capability x 10: 89 for 8.9; None if the driver does not tell.
        memory_bytes: Its own memory; None for a card that shares the machine's.
        driver: Version of the NVIDIA driver.
        uuid: `GPU-…`; names the card in CUDA_VISIBLE_DEVICES.
    """

    index: int
    name: str
    sm: int | None
    memory_bytes: int | None
    driver: str
    uuid: str


def find_gpu(sm: int) -> Gpu:
    """The first card of this machine with compute capability `sm` / 10.

    Raises:
        IncompatibleError: There is no card, none of this SM, or the driver does not work.
    """
    gpus = probe_gpus()
    for gpu in gpus:
        if gpu.sm == sm:
            return gpu
    found = ", ".join(f"{gpu.name} (sm_{gpu.sm or '?'})" for gpu in gpus)
    raise IncompatibleError(
        f"this needs a GPU with sm_{sm}, found {found}: an engine runs only on the SM that it was "
        "built on; use a machine with such a card, or a target that is the card here"
    )


def probe_gpus() -> tuple[Gpu, ...]:
    """All cards of this machine, at least one.

    Raises:
        IncompatibleError: There is no card, or the driver is missing or does not work.
    """
    try:
        done = subprocess.run(
            _COMMAND,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            timeout=_TIMEOUT_S,
        )
    except FileNotFoundError as error:
        raise IncompatibleError(
            "no NVIDIA GPU here: nvidia-smi is missing, and it comes with the driver"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise IncompatibleError(
            f"nvidia-smi gave no answer in {_TIMEOUT_S:.0f} s: the driver hangs; see dmesg, reboot"
        ) from error
    if done.returncode == 0 and (gpus := parse_gpus(done.stdout)):
        return gpus
    said = " ".join(done.stdout.split()) or "nothing"
    ways_on = [way_on for text, way_on in _WAYS_ON.items() if text in said]
    raise IncompatibleError(
        f"no usable NVIDIA GPU here: nvidia-smi exited {done.returncode} and said: {said}"
        + "".join(f"; {way_on}" for way_on in ways_on)
    )


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """Read what nvidia-smi printed; a line that is no card (a warning, a fault) is left out."""
    rows = [[part.strip() for part in line.split(",")] for line in text.splitlines()]
    return tuple(
        Gpu(
            index=int(row[0]),
            name=row[1],
            sm=int(digits) if (digits := row[2].replace(".", "")).isdigit() else None,
            memory_bytes=int(row[3]) << 20 if row[3].isdigit() else None,  # it counts in MiB
            driver=row[4],
            uuid=row[5],
        )
        for row in rows
        if len(row) == 6 and row[0].isdigit()
    )
