"""What an engine format is: everything that differs between one and another.

    spec = format_spec("trtrtx")
    spec.variant(quant_spec("fp8"), compiler.limits, target)  # sm89-trtrtx-fp8-b64-s1024

A format is one folder of this package: its module `spec` has a line `SPEC = ...`, its module
`compiler` a line `KIND = ...`, the settings class that recipes choose by `compiler.kind`. Code
outside this package asks a `FormatSpec`, and never compares a format's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from pipeline.core.cache import StageCache, StageResult, digest_folder
from pipeline.core.errors import CorruptError, Fault, IncompatibleError, RecipeError
from pipeline.core.hardware import Target
from pipeline.core.published import digest_of
from pipeline.core.settings import marked_modules, read_mark
from pipeline.core.values import Checkpoint, Engine, Format, Limits
from pipeline.model.spec import ModelSpec
from pipeline.quant.spec import KV_CACHE_DTYPES, QuantSpec, quant_spec
from pipeline.quant.unified import UnifiedCheckpoint

_MARK, _MODULE = "SPEC", "spec"

PAGED_SHARE = 0.9
"""Share of device memory that a paged runtime uses: vLLM's `gpu_memory_utilization` and
TensorRT-LLM's `free_gpu_memory_fraction` are 0.9 unless set."""


@runtime_checkable
class EngineCompiler(Protocol):
    """Turns a checkpoint into something a runtime loads."""

    @property
    def format(self) -> Format:
        """Which runtime family reads the result."""

    @property
    def limits(self) -> Limits:
        """Batch and context sizes that it builds for."""

    @property
    def pinned_runtime(self) -> tuple[str, str]:
        """Name and version of what will run the engine; an empty version where it is not known."""

    def check_machine(self, target: Target) -> None:
        """Find out in seconds, before any download, whether this machine can compile.

        IncompatibleError names the ways on.
        """

    def inputs(self, target: Target) -> Mapping[str, Any]:
        """Everything but the checkpoint that shapes the engine's bytes, as JSON values."""

    def compile(
        self, checkpoint: Checkpoint, target: Target, cache: StageCache, log_dir: Path
    ) -> Engine:
        """Convert and compile, or take it from the cache.

        Raises:
            ToolError: The compiler failed; its log is in `log_dir`.
            PipelineError: It succeeded, but not with what was asked.
        """


@runtime_checkable
class CardCompiler(EngineCompiler, Protocol):
    """A compiler that needs the card itself, and can do part of its work without."""

    @property
    def command(self) -> tuple[str, ...]:
        """What it runs on the card's machine, with relative paths."""

    def convert(self, checkpoint: Checkpoint, cache: StageCache) -> StageResult:
        """What it makes of the checkpoint on any machine."""


@dataclass(frozen=True, kw_only=True)
class FitRule:
    """How a runtime uses device memory.

    Attributes:
        static: The KV cache is allocated whole, for the largest batch at full context; else it is
            paged, and must hold what the declared workloads hold at their end.
        usable_share: Share of the card that weights, workspace and cache may take.
        mask_bytes: Of one pair of token and cache slot in the attention mask of a step, if any.
        overhead_bytes: What an engine holds beside its weights.
    """

    static: bool
    usable_share: float
    mask_bytes: int = 0
    overhead_bytes: int = 0


PAGED = FitRule(static=False, usable_share=PAGED_SHARE)


@dataclass(frozen=True, kw_only=True)
class CompileMemory:
    """Memory of the machine that a compiler takes: `per_byte` of weights, and at least so much."""

    per_byte: float
    least_bytes: int = 0
    source: str

    def needed_bytes(self, engine_bytes: int) -> int:
        """Peak of compiling an engine of so many bytes of weights."""
        return max(self.least_bytes, int(self.per_byte * engine_bytes))


@dataclass(frozen=True, kw_only=True)
class FormatSpec:
    """An engine format.

    Attributes:
        name: Of its folder, and of its option in conf/compiler.
        runtime: What loads it.
        holds: Whether a precision can be expressed in it.
        kv_cache_dtypes: Types of its KV cache, the smallest first.
        fit: How its runtime uses device memory.
        bound_to: What an engine runs on: one `card`, every card of one `sm`, or any (None).
        runner: Option of conf/runner that executes it on a card.
        substitute: Option of conf/runner that executes the same graph or checkpoint without the
            card; equal to `runner` where there is none.
        packages: Modules that building imports beside ModelOpt's.
        files: Files that its folder must contain, as glob patterns; the weights last.
        serve_args: Arguments of the runtime's server.
        memory: Of the machine while it compiles; None where nothing is compiled.
        check_shape: Raises a RecipeError for a model that its converter cannot express.
        is_checkpoint: It is the quantized checkpoint itself, which Transformers and others read.
    """

    name: str
    runtime: str
    holds: Callable[[QuantSpec], bool]
    kv_cache_dtypes: tuple[str, ...]
    fit: FitRule
    bound_to: Literal["card", "sm"] | None
    runner: str
    substitute: str
    packages: tuple[str, ...]
    files: tuple[str, ...]
    serve_args: Callable[[Limits], tuple[str, ...]]
    memory: CompileMemory | None = None
    check_shape: Callable[[ModelSpec], object] = lambda _shape: None
    is_checkpoint: bool = False

    def shape_faults(self, shape: ModelSpec) -> Sequence[Fault]:
        """What of a model its converter cannot express."""
        try:
            self.check_shape(shape)
        except RecipeError as error:
            return error.faults
        return ()

    def variant(self, precision: QuantSpec, limits: Limits, target: Target) -> str:
        """Middle part of a reference; what runs anywhere names no sizes, its server's arguments."""
        place = {"card": target.id, "sm": f"sm{target.sm}", None: "any"}[self.bound_to]
        parts = [place, self.name, precision.name]
        if self.bound_to is not None:
            parts += [f"b{limits.max_batch_size}", f"s{limits.max_seq_len}"]
        return "-".join(parts) + KV_CACHE_DTYPES[limits.kv_cache_dtype].suffix

    def engine(
        self,
        compiler: EngineCompiler,
        checkpoint: Checkpoint,
        target: Target,
        folder: Path,
        **proven: Any,
    ) -> Engine:
        """A finished engine folder with what follows from the format; `proven`: the other fields.

        A paged cache holds at least one request of full length.
        """
        limits = compiler.limits
        rows = limits.max_batch_size if self.fit.static else 1
        cache_bytes = UnifiedCheckpoint(checkpoint.dir).spec.kv_bytes(
            rows * limits.max_seq_len, KV_CACHE_DTYPES[limits.kv_cache_dtype].bytes_per_element
        )
        weight_bytes = sum(path.stat().st_size for path in folder.glob(self.files[-1]))
        return Engine(
            dir=folder,
            digest=digest_of([file.to_json() for file in digest_folder(folder)]),
            format=self.name,
            variant=self.variant(quant_spec(checkpoint.precision), limits, target),
            runtime=compiler.pinned_runtime,
            sms=() if self.bound_to is None else (target.sm,),
            limits=limits,
            min_vram_bytes=weight_bytes + cache_bytes,
            serve_args=self.serve_args(limits),
            **proven,
        )

    def require_files(self, folder: Path) -> None:
        """Refuse an engine folder that lacks what the runtime loads (CorruptError)."""
        if missing := [pattern for pattern in self.files if not any(folder.glob(pattern))]:
            raise CorruptError(
                f"the {self.name} engine in {folder} has no {', '.join(missing)}; build it again "
                "with --rebuild"
            )


def format_specs() -> dict[str, FormatSpec]:
    """Every format, by name."""
    return {name: format_spec(name) for name in marked_modules(__package__, _MARK, _MODULE)}


def format_spec(name: str) -> FormatSpec:
    """One format; IncompatibleError if there is none, such as that of a newer package."""
    modules = marked_modules(__package__, _MARK, _MODULE)
    if name not in modules:
        raise IncompatibleError(
            f"the format {name} is not known here, only {', '.join(modules)}; update Enginesmith"
        )
    found: FormatSpec = read_mark(modules[name], _MARK)
    return found
