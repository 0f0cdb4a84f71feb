"""TensorRT-LLM: builds the engine with `trtllm-build`, on the card that it is for."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from pydantic import PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from pipeline.core.cache import StageCache, StageResult
from pipeline.core.errors import IncompatibleError, ToolError
from pipeline.core.hardware import GIB, Target
from pipeline.core.process import last_lines
from pipeline.core.settings import STRICT
from pipeline.core.stages import Stage
from pipeline.core.values import Checkpoint, Engine, Format, Limits
from pipeline.formats.trtllm.build_tool import (
    CHECKPOINT,
    ENGINE,
    TIMING,
    TIMING_CACHE_FILE,
    BuildPaths,
    Plugins,
    build_command,
    expected_config,
    explain,
    read_back,
)
from pipeline.formats.trtllm.config import Dtype
from pipeline.formats.trtllm.convert import KvCacheDtype, TrtLlmSettings, convert_trtllm
from pipeline.formats.trtllm.environment import Environment, TimingCache, probe_environment
from pipeline.formats.trtllm.place import Place, Shared, Where, choose_place, find_card
from pipeline.formats.trtllm.spec import NAME, SPEC, VERSION
from pipeline.quant.unified import copy_companions

STAGE = Stage(name="compile-trtllm", version=2, code=("pipeline.formats.trtllm",))

WAYS_ON = """\
three ways on:
  compiler=trtrtx      a TensorRT-RTX engine, built without a GPU
  compiler=checkpoint  the FP8 checkpoint itself, for vLLM, SGLang and TensorRT-LLM >= 1.3
  make image           the build image, on a machine with the card; then the same command"""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrtLlmCompiler:
    """Compiler for one card: TensorRT times kernels on it.

    Attributes:
        max_batch_size: Requests at once.
        max_seq_len: Prompt + output tokens of one request.
        max_num_tokens: Tokens of one iteration; a longer prompt is prefilled in chunks. At most
            `max_batch_size` x `max_seq_len`.
        opt_num_tokens: Token count that kernels are chosen for; None with several profiles.
        kv_cache_dtype: Type of the paged cache: `fp8` uses the checkpoint's calibrated scales,
            `bfloat16` means the 16-bit type that `dtype` names.
        dtype: 16-bit type of activations and of what is not FP8.
        where: `auto` runs on this machine if `trtllm-build` is on the PATH, else in a container.
        image: The build image.
        timeout_s: After so many seconds the build is stopped.
        memory_gib: Limit of the container's memory; None for none.
        plugins: Kernel choices.
    """

    format: ClassVar[Format] = SPEC.name
    pinned_runtime: ClassVar[tuple[str, str]] = (NAME, VERSION)

    max_batch_size: PositiveInt
    max_seq_len: PositiveInt
    max_num_tokens: PositiveInt
    opt_num_tokens: PositiveInt | None
    kv_cache_dtype: KvCacheDtype
    dtype: Dtype
    where: Where
    image: str
    timeout_s: PositiveFloat
    memory_gib: PositiveFloat | None
    plugins: Plugins

    def __post_init__(self) -> None:
        if self.max_num_tokens < self.max_batch_size:
            raise ValueError(
                f"max_num_tokens ({self.max_num_tokens}) must be >= max_batch_size "
                f"({self.max_batch_size}); increase compiler.max_num_tokens"
            )
        # The next two TensorRT-LLM would only warn of, and build something else:
        # check_max_num_tokens in _common.py.
        if self.max_num_tokens < self.plugins.tokens_per_block:
            raise ValueError(
                f"max_num_tokens ({self.max_num_tokens}) must be >= plugins.tokens_per_block "
                f"({self.plugins.tokens_per_block}); increase compiler.max_num_tokens"
            )
        if self.opt_num_tokens is not None and self.opt_num_tokens > self._num_tokens:
            raise ValueError(
                f"opt_num_tokens ({self.opt_num_tokens}) must be <= max_num_tokens "
                f"({self._num_tokens})"
            )
        if self.opt_num_tokens is not None and self.plugins.multiple_profiles:
            raise ValueError(
                f"opt_num_tokens ({self.opt_num_tokens}) does not go with "
                "plugins.multiple_profiles, which has an optimum for each range; set one of the "
                "two to null or false"
            )

    @property
    def _num_tokens(self) -> int:
        """No more than all requests at full length: TensorRT-LLM would lower it without a word."""
        most = max(self.max_batch_size * self.max_seq_len, self.plugins.tokens_per_block)
        return min(self.max_num_tokens, most)

    @property
    def limits(self) -> Limits:
        return Limits(
            max_batch_size=self.max_batch_size,
            max_seq_len=self.max_seq_len,
            max_num_tokens=self._num_tokens,
            kv_cache_dtype=self.conversion.kv_cache_dtype,
        )

    @property
    def conversion(self) -> TrtLlmSettings:
        """How the unified checkpoint becomes TensorRT-LLM's."""
        cache_dtype: KvCacheDtype = "fp8" if self.kv_cache_dtype == "fp8" else self.dtype
        return TrtLlmSettings(kv_cache_dtype=cache_dtype, dtype=self.dtype)

    @property
    def command(self) -> tuple[str, ...]:
        """The build, with relative paths."""
        return self._command(BuildPaths())

    def _command(self, paths: BuildPaths) -> tuple[str, ...]:
        return build_command(self.limits, self.plugins, paths, opt_num_tokens=self.opt_num_tokens)

    def inputs(self, target: Target) -> dict[str, Any]:
        return {
            **STAGE.identity,
            "command": list(self.command),
            "convert": self.conversion.inputs(),
            "card": target.card,
            "sm": target.sm,
            "tools": {NAME: VERSION},
        }

    def check_machine(self, target: Target) -> None:
        """Find out in seconds, before any download, whether this machine can build at all.

        Raises:
            IncompatibleError: It cannot; names the ways on.
            AccessError: The user may not use Docker.
        """
        self._place(target)

    def compile(
        self, checkpoint: Checkpoint, target: Target, cache: StageCache, log_dir: Path
    ) -> Engine:
        place = self._place(target)
        environment = probe_environment(place, target, log_dir / "probe.log")
        converted = self.convert(checkpoint, cache)
        inputs = {
            "checkpoint": converted.digest,
            "environment": environment.shaping,
            **self.inputs(target),
        }

        def produce(out: Path) -> None:
            timing = TimingCache(cache.root, environment)
            self._build(converted.dir, out, place, timing, log_dir / "compile.log")
            copy_companions(checkpoint.dir, out / ENGINE)

        result = cache.run(STAGE, inputs, produce)
        checks = result.read_json("checks.json")
        built_with = Environment(**checks["environment"])
        return SPEC.engine(
            self,
            checkpoint,
            target,
            result.dir / ENGINE,
            tools={**checkpoint.calibration["tools"], **built_with.tools},
            checks={"trtllm_build": checks, "conversion": converted.read_json("conversion.json")},
        )

    def convert(self, checkpoint: Checkpoint, cache: StageCache) -> StageResult:
        """TensorRT-LLM's checkpoint, which needs no card."""
        return convert_trtllm(checkpoint.dir, checkpoint.digest, self.conversion, cache)

    def _place(self, target: Target) -> Place:
        try:
            return choose_place(
                self.where,
                image=self.image,
                card=lambda: find_card(target),
                memory_bytes=None if self.memory_gib is None else int(self.memory_gib * GIB),
            )
        except IncompatibleError as error:
            raise IncompatibleError(
                f"compiler=trtllm cannot build here: {error}\n{WAYS_ON}"
            ) from error

    def _build(
        self, converted_dir: Path, out: Path, place: Place, timing: TimingCache, log_path: Path
    ) -> None:
        """Fill `out / ENGINE`, and write what was checked beside it."""
        engine_dir, timing_dir = out / ENGINE, out / TIMING
        checkpoint = Shared(name=CHECKPOINT, source=converted_dir)
        engine = Shared(name=ENGINE, source=engine_dir, read_only=False)
        kernels = Shared(name=TIMING, source=timing_dir, read_only=False)
        engine_dir.mkdir()
        timing_dir.mkdir()
        lent = timing.lend(timing_dir)
        paths = BuildPaths(
            checkpoint_dir=place.path(checkpoint),
            engine_dir=place.path(engine),
            timing_cache_in=f"{place.path(kernels)}/{lent.name}" if lent else None,
            timing_cache_out=f"{place.path(kernels)}/{TIMING_CACHE_FILE}",
        )
        self._run(place, paths, (checkpoint, engine, kernels), log_path)
        config = json.loads((converted_dir / "config.json").read_text())
        expected = expected_config(self.limits, self.opt_num_tokens, self.plugins, config)
        checks = {
            "effective": read_back(engine_dir, expected),
            "environment": asdict(timing.environment),
            "command": list(self.command),
        }
        timing.keep(timing_dir)
        shutil.rmtree(timing_dir)
        (out / "checks.json").write_text(json.dumps(checks, indent=1) + "\n")

    def _run(
        self, place: Place, paths: BuildPaths, shared: tuple[Shared, ...], log_path: Path
    ) -> None:
        """Run the build; a failure with a known cause says what to change."""
        command, started = self._command(paths), time.monotonic()
        try:
            place.run(command, shared, stage="compile", log_path=log_path, timeout_s=self.timeout_s)
        except ToolError as error:
            timed_out = time.monotonic() - started >= self.timeout_s  # its own message says so
            if timed_out or not (hint := explain(log_path, error.returncode)):
                raise
            raise ToolError(
                stage=error.stage,
                command=error.command,
                returncode=error.returncode,
                log_path=log_path,
                last_lines=last_lines(log_path),
                hint=hint,
            ) from error


KIND = TrtLlmCompiler
