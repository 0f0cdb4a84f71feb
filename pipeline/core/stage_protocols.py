"""What produces the values that stages hand to each other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from pipeline.core.cache import StageCache, StageResult
from pipeline.core.hardware import Target
from pipeline.core.values import Checkpoint, Engine, Format, Licence, Limits, Weights

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@runtime_checkable
class WeightSource(Protocol):
    """Brings a Hugging Face folder into the weight cache."""

    @property
    def terms(self) -> Licence:
        """What the recipe says about the licence; known before anything is fetched."""
        ...

    def fetch(self) -> Weights:
        """Download or convert, unless the cache holds it; verified, atomic.

        Raises:
            NotFoundError: No such repository, commit, folder or package.
            AccessError: Gated or private.
            CorruptError: Bytes are not what they claim to be.
            TransientError: Network or disk; trying again may work.
        """
        ...


class CalibrationText(Protocol):
    """Which text sets the activation scales."""

    @property
    def batch_size(self) -> int:
        """Windows per forward pass."""
        ...

    def inputs(self) -> Mapping[str, Any]:
        """Everything about it that shapes scales, as JSON values."""
        ...

    def record(self) -> Mapping[str, str]:
        """Which text it was, for the calibration record."""
        ...

    def windows(self, tokenizer: Any) -> NDArray[np.int64]:
        """Tokens that calibration reads, [windows, tokens]."""
        ...


@runtime_checkable
class Quantizer(Protocol):
    """Turns weights into the unified checkpoint."""

    @property
    def precision(self) -> str:
        """What it quantizes to: a name that `pipeline.quant.spec` knows."""
        ...

    @property
    def keep_16bit(self) -> tuple[str, ...]:
        """Patterns (fnmatch) of linears that stay 16-bit."""
        ...

    def inputs(self, weights: Weights, calibration: CalibrationText) -> Mapping[str, Any]:
        """Everything that shapes the checkpoint's bytes, as JSON values."""
        ...

    def quantize(
        self, weights: Weights, calibration: CalibrationText, cache: StageCache
    ) -> Checkpoint:
        """Make the checkpoint, or take it from the cache."""
        ...


@runtime_checkable
class EngineCompiler(Protocol):
    """Turns a checkpoint into something a runtime loads."""

    @property
    def format(self) -> Format:
        """Which runtime family reads the result."""
        ...

    @property
    def limits(self) -> Limits:
        """Batch and context sizes that it builds for."""
        ...

    @property
    def pinned_runtime(self) -> tuple[str, str]:
        """Name and version of what will run the engine; an empty version where it is not known."""
        ...

    def check_machine(self, target: Target) -> None:
        """Find out in seconds, before any download, whether this machine can compile.

        Raises:
            IncompatibleError: It cannot; names the ways on.
        """
        ...

    def inputs(self, target: Target) -> Mapping[str, Any]:
        """Everything but the checkpoint that shapes the engine's bytes, as JSON values."""
        ...

    def compile(
        self, checkpoint: Checkpoint, target: Target, cache: StageCache, log_dir: Path
    ) -> Engine:
        """Convert and compile, or take it from the cache.

        Raises:
            ToolError: The compiler failed; its log is in `log_dir`.
            PipelineError: It succeeded, but not with what was asked.
        """
        ...


@runtime_checkable
class CardCompiler(EngineCompiler, Protocol):
    """A compiler that needs the card itself, and can do part of its work without."""

    @property
    def command(self) -> tuple[str, ...]:
        """What it runs on a machine with the card, with relative paths."""
        ...

    def convert(self, checkpoint: Checkpoint, cache: StageCache) -> StageResult:
        """What it makes of the checkpoint on any machine."""
        ...
