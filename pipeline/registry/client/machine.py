"""Facts of the machine that will run the engine.

An init container has no GPU and not the server's runtime. So what a flag says is believed, and
recorded as given; `--gpu auto` asks NVML; what neither tells stays unknown and is reported, not
assumed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.core.errors import Fault, IncompatibleError, RecipeError
from pipeline.core.hardware import card_name, known_targets
from pipeline.registry.reference import check_part

Origin = Literal["given", "probed", "known of the card"]

_UNITS = {"": 1, "MB": 10**6, "GB": 10**9, "MiB": 1 << 20, "GiB": 1 << 30}
_SIZE = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]+)?) ?(?P<unit>[A-Za-z]*)")
_SM = re.compile(r"sm_?(?P<number>[0-9]{2,3})")
_VERSION = re.compile(r"[0-9]+(?:\.[0-9]+)*")


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What will load the engine; `version` is empty if only its name was given."""

    name: str
    version: str = ""

    def __str__(self) -> str:
        return f"{self.name}=={self.version}" if self.version else self.name


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a machine; None is unknown."""

    sm: int | None = None  # compute capability x 10
    card: str | None = None  # as NVML calls it, spaces as dashes
    vram_bytes: int | None = None  # free memory if probed; else what was given, or the card's own
    driver: str | None = None
    cuda: str | None = None  # newest that the driver serves, such as `13.0`
    runtime: Runtime | None = None
    origins: Mapping[str, Origin] = field(default_factory=dict)  # of every fact that is known

    def to_json(self) -> dict[str, Any]:
        facts = {name: value for name, value in vars(self).items() if name != "origins"}
        facts["runtime"] = str(self.runtime) if self.runtime else None
        return {
            name: None if value is None else {"value": value, "origin": self.origins[name]}
            for name, value in facts.items()
        }


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What the user says of the machine, as typed."""

    gpu: str = "auto"  # or `none`, a card's id or name, `sm89`
    runtime: str | None = None  # `vllm==0.29` or `vllm`
    vram: str | None = None  # `24GiB`
    driver: str | None = None  # `580.65.06`


def facts_of(flags: Flags, environ: Mapping[str, str] = os.environ) -> Facts:
    """What is known of the machine; flags come before what NVML says.

    RecipeError if a flag cannot be read, or the machine has several kinds of cards;
    IncompatibleError if it is `auto`, and there is no card, or one that is split by MIG.
    """
    given: dict[str, Any] = {
        "runtime": parse_runtime(flags.runtime) if flags.runtime else None,
        "vram_bytes": parse_size(flags.vram) if flags.vram else None,
        "driver": flags.driver,
    }
    if flags.driver is not None and version_key(flags.driver) is None:
        raise _fault("--driver", f"{flags.driver!r} is not a version; write it like 580.65.06")
    values: dict[str, Any] = {}
    origins: dict[str, Origin] = {}
    for origin, found in (("given", given), *_gpu_facts(flags.gpu, environ)):
        for name, value in found.items():
            if value is not None and name not in values:
                values[name], origins[name] = value, origin
    return Facts(**values, origins=origins)


def _gpu_facts(gpu: str, environ: Mapping[str, str]) -> Iterator[tuple[Origin, Mapping[str, Any]]]:
    if gpu == "auto":
        yield "probed", _probe(environ.get("CUDA_VISIBLE_DEVICES"))
    elif match := _SM.fullmatch(gpu):
        yield "given", {"sm": int(match["number"])}
    elif gpu != "none":
        card = card_name(gpu)
        targets = known_targets()
        target = next((one for one in targets if card.lower() in {one.id, one.card.lower()}), None)
        if target is not None:
            yield "given", {"card": target.card}
            yield "known of the card", {"sm": target.sm, "vram_bytes": target.memory_bytes}
        elif not card.lower().startswith(("nvidia-", "tesla-", "quadro-", "grid-")):
            # A typing error must not pass for a card that has no statements.
            known = ", ".join(one.id for one in targets)
            raise _fault(
                "--gpu",
                f"{gpu!r} is not a card; write auto, none, sm89, what NVML calls it "
                f"(NVIDIA-GeForce-RTX-4090), or one of {known}",
            )
        else:
            yield "given", {"card": check_part("card", card)}


def _probe(visible: str | None) -> dict[str, Any]:
    """What NVML tells of the cards that CUDA would see; of several the one with the most memory."""
    from pipeline.core.gpu import cuda_version, nvml_devices, sm_of

    advice = "say what the engine will run on with --gpu rtx4090 (or --gpu none: not checked)"
    try:
        with nvml_devices(visible) as (nvml, devices):
            if not devices:
                raise IncompatibleError("no NVIDIA GPU is visible here")
            cards = sorted({card_name(nvml.nvmlDeviceGetName(device)) for device in devices})
            if len(cards) > 1:
                raise _fault("--gpu", f"this machine has {', '.join(cards)}; say which with --gpu")
            if any(_is_split(nvml, device) for device in devices):
                advice += ", and --vram"
                raise IncompatibleError(f"{cards[0]} is split by MIG, and a part is not the card")
            return {
                "sm": sm_of(nvml, devices[0]),
                "card": cards[0],
                "vram_bytes": max(int(nvml.nvmlDeviceGetMemoryInfo(one).free) for one in devices),
                "driver": nvml.nvmlSystemGetDriverVersion(),
                "cuda": cuda_version(nvml.nvmlSystemGetCudaDriverVersion_v2()),
            }
    except IncompatibleError as error:
        raise IncompatibleError(f"{error}; {advice}") from None


def _is_split(nvml: Any, device: Any) -> bool:
    try:
        return bool(nvml.nvmlDeviceGetMigMode(device)[0])
    except nvml.NVMLError:  # a card that cannot be split
        return False


def parse_size(text: str) -> int:
    """Bytes of `24GiB`, `24 GB`, `512MiB` or a plain number."""
    match = _SIZE.fullmatch(text)
    if match is None or match["unit"] not in _UNITS:
        raise _fault("--vram", f"{text!r} is not a size; write 24GiB or 24GB")
    return int(float(match["number"]) * _UNITS[match["unit"]])


def parse_runtime(text: str) -> Runtime:
    """`vllm==0.29`, or `vllm` alone."""
    name, _, version = text.partition("==")
    name = name.strip().lower().replace("_", "-")
    if not re.fullmatch(r"[a-z0-9]+(?:-[a-z0-9]+)*", name) or (
        "==" in text and not version.strip()[:1].isdigit()
    ):
        raise _fault("--runtime", f"{text!r} is not a runtime; write vllm==0.29 or vllm")
    return Runtime(name=name, version=version.strip())


def version_key(text: str) -> tuple[int, ...] | None:
    """Numbers of a version without closing zeros: `0.29` is `0.29.0`; None if it has others."""
    if not _VERSION.fullmatch(text):
        return None
    numbers = [int(number) for number in text.split(".")]
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _fault(path: str, message: str) -> RecipeError:
    return RecipeError([Fault(path, message)])
