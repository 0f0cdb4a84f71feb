"""Executes a TensorRT-RTX engine itself, on a card whose SM it was compiled for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import ClassVar

from pydantic import PositiveFloat
from pydantic.dataclasses import dataclass

from pipeline.core.data import cache_root
from pipeline.core.gpu import read_conditions
from pipeline.core.settings import STRICT
from pipeline.core.values import Engine
from pipeline.formats.spec import format_spec
from pipeline.formats.trtrtx.spec import PACKAGE, PLAN_FILE
from pipeline.runners.child import ChildSession, Program, Timeouts, open_child, session_program
from pipeline.runners.decode import DecoderSession
from pipeline.runners.rtx_engine import CudaDevice, RtxDecoder, RtxEngine
from pipeline.runners.runner import (
    BATCHES,
    NO_CARD,
    Ability,
    Device,
    installed_version,
    torch_fault,
)
from pipeline.runners.session import Session


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrtRtxRunner:
    """Runs a trtrtx engine in a process that ends with the session. Not run on a card yet.

    An engine holds its kernels as source; TensorRT-RTX compiles them on the card when it is loaded
    and, for shapes that it has not seen, before that step goes on, so that a warm-up takes all of
    it. This machine's cache keeps them; the library itself refuses those of another card, driver
    or version.

    Attributes:
        load_timeout_s: Longest time for loading, compilation included.
        answer_timeout_s: Longest time for one answer, or the next token of a stream.
    """

    name: ClassVar[str] = "tensorrt-rtx"
    device: ClassVar[Device] = "cuda"
    abilities: ClassVar[frozenset[Ability]] = BATCHES

    load_timeout_s: PositiveFloat
    answer_timeout_s: PositiveFloat

    def why_not(self, engine: Engine) -> str | None:
        if format_spec(engine.format).runner != "tensorrt_rtx":
            return f"runner=tensorrt_rtx does not run {engine.format} engines"
        if reason := _missing_package(engine.runtime[1]) or _wrong_card(engine.sms):
            return f"runner=tensorrt_rtx {reason}; or take runner=onnxruntime, its graph on a CPU"
        return None

    def open(self, engine: Engine) -> AbstractContextManager[Session]:
        return self.open_folder(engine.dir, engine.digest)

    def open_folder(self, engine_dir: Path, digest: str) -> AbstractContextManager[ChildSession]:
        """Load the engine of a package's `engine/` folder; `digest` names its runtime cache."""
        timeouts = Timeouts(load_s=self.load_timeout_s, answer_s=self.answer_timeout_s)
        return open_child(self.program(engine_dir, digest), timeouts)

    def program(
        self, engine_dir: Path, digest: str, opener: str = f"{__name__}:open_plan"
    ) -> Program:
        """What the child loads; `opener` as in `session_program`, the rest as in `open_folder`."""
        kernels = str(cache_root() / "rtx-kernels" / digest[:24])
        plan = str(engine_dir / PLAN_FILE)
        return session_program("TensorRT-RTX", opener, plan=plan, runtime_cache=kernels)


@contextlib.contextmanager
def open_plan(
    plan: str, runtime_cache: str, open_device: Callable[[], CudaDevice] = CudaDevice
) -> Iterator[DecoderSession]:
    """An engine in this process, as `RtxEngine`; its compiled kernels are kept at the end."""
    engine = RtxEngine(Path(plan), open_device(), Path(runtime_cache))
    sizes = {"context": engine.context, "logits_per_step": engine.logits_per_step}
    yield DecoderSession(lambda batch: RtxDecoder(engine, batch), **sizes)
    engine.save_runtime_cache()


def _missing_package(wanted: str) -> str | None:
    installed = installed_version(PACKAGE)
    if installed == wanted:
        return torch_fault()
    return (
        f"needs {PACKAGE} {wanted}, which compiled the engine; got {installed or 'none'}: "
        f"pip install {PACKAGE}=={wanted}"
    )


def _wrong_card(sms: tuple[int, ...]) -> str | None:
    card = read_conditions()
    wanted = " or ".join(str(sm) for sm in sms)
    if card is None:
        return f"needs a CUDA device of SM {wanted}, and {NO_CARD}"
    if card.sm not in sms:
        return (
            f"needs a CUDA device of SM {wanted}, which the engine was compiled for; {card.gpu} "
            f"has SM {card.sm}: build with its target"
        )
    return None


KIND = TrtRtxRunner
