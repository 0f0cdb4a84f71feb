"""TensorRT-LLM: builds the engine with `trtllm-build`, on the card that it is for."""

from __future__ import annotations

import inspect
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from pipeline.core.cache import Stage, StageCache, StageResult
from pipeline.core.errors import IncompatibleError
from pipeline.core.hardware import GIB, Target
from pipeline.core.published import digest_of
from pipeline.core.settings import STRICT
from pipeline.core.values import Checkpoint, Engine, Format, Limits
from pipeline.formats.trtllm.build_tool import (
    CHECKPOINT,
    ENGINE,
    TIMING,
    TIMING_CACHE_FILE,
    Plugins,
    build_command,
    expected_config,
    explain,
    read_back,
)
from pipeline.formats.trtllm.convert import conversion_inputs, convert_trtllm
from pipeline.formats.trtllm.layout import Dtype
from pipeline.formats.trtllm.place import Shared, ToolHost, Where, choose_place, find_card
from pipeline.formats.trtllm.spec import NAME, SPEC, VERSION
from pipeline.quant.spec import SHAPING_CODE
from pipeline.quant.unified import copy_companions

STAGE = Stage(
    name="compile-trtllm",
    version=2,
    code=("pipeline.formats.trtllm", *SHAPING_CODE),
)

_TOOLS = {
    NAME: "tensorrt_llm",
    "tensorrt": "tensorrt",
    "cuda": "cuda",
    "build-image": "image",
}
"""Name in a manifest -> in the environment. An engine loads in its own version of TensorRT only."""
_PROBE_TIMEOUT_S = 300.0

WAYS_ON = """\
three ways on:
  compiler=trtrtx      a TensorRT-RTX engine, built without a GPU
  compiler=checkpoint  the FP8 checkpoint itself, for vLLM, SGLang and TensorRT-LLM >= 1.3
  make image           the build image, on a machine with the card; then the same command"""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrtLlmCompiler:
    """Compiler for one card: TensorRT times kernels on it.

    Attributes:
        max_seq_len: Prompt + output tokens of one request.
        max_num_tokens: Tokens of one iteration; a longer prompt is prefilled in chunks.
        opt_num_tokens: Token count that kernels are chosen for; None with several profiles.
        kv_cache_dtype: `fp8` uses the checkpoint's calibrated scales, `bfloat16` means `dtype`.
        dtype: 16-bit type of activations and of what is not FP8.
        where: `auto` runs on this machine if `trtllm-build` is on the PATH, else in a container.
        memory_gib: Limit of the container's memory.
    """

    format: ClassVar[Format] = SPEC.name
    pinned_runtime: ClassVar[tuple[str, str]] = (NAME, VERSION)

    max_batch_size: PositiveInt
    max_seq_len: PositiveInt
    max_num_tokens: PositiveInt
    opt_num_tokens: PositiveInt | None
    kv_cache_dtype: Literal["fp8", "bfloat16", "float16"]
    dtype: Dtype
    where: Where
    image: str
    timeout_s: PositiveFloat
    memory_gib: PositiveFloat | None
    plugins: Plugins

    def __post_init__(self) -> None:
        if self.kv_cache_dtype == "float16" != self.dtype:
            raise ValueError(
                f"kv_cache_dtype (float16) must be fp8 or dtype ({self.dtype}): a 16-bit cache has "
                "the type of the activations"
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
            kv_cache_dtype="fp8" if self._kv_fp8 else self.dtype,
        )

    @property
    def _kv_fp8(self) -> bool:
        return self.kv_cache_dtype == "fp8"

    @property
    def command(self) -> tuple[str, ...]:
        """As of `CardCompiler`."""
        return build_command(self.limits, self.plugins, opt_num_tokens=self.opt_num_tokens)

    def inputs(self, target: Target) -> dict[str, Any]:
        return {
            **STAGE.identity,
            "command": list(self.command),
            "convert": conversion_inputs(dtype=self.dtype, kv_fp8=self._kv_fp8),
            "card": target.card,
            "sm": target.sm,
            "tools": {NAME: VERSION},
        }

    def check_machine(self, target: Target) -> None:
        """Find out in seconds, before any download, whether this machine can build at all."""
        self._place(target)

    def compile(
        self, checkpoint: Checkpoint, target: Target, cache: StageCache, log_dir: Path
    ) -> Engine:
        place = self._place(target)
        environment = probe_environment(place, target, log_dir / "probe.log")
        shaping = {name: value for name, value in environment.items() if name != "driver"}
        timing = cache.root / "timing" / digest_of(shaping)[:24] / TIMING_CACHE_FILE
        converted = self.convert(checkpoint, cache)

        def produce(out: Path) -> None:
            effective = self._build(converted.dir, out, place, timing, log_dir / "compile.log")
            copy_companions(checkpoint.dir, out / ENGINE)
            checks = {
                "effective": effective,
                "environment": environment,
                "command": list(self.command),
            }
            (out / "checks.json").write_text(json.dumps(checks, indent=1) + "\n")

        inputs = {"checkpoint": converted.digest, "environment": shaping, **self.inputs(target)}
        result = cache.run(STAGE, inputs, produce)
        checks = result.read_json("checks.json")
        tools = {name: checks["environment"][key] for name, key in _TOOLS.items()}
        return SPEC.engine(
            self,
            checkpoint,
            target,
            result.dir / ENGINE,
            tools={**checkpoint.calibration["tools"], **{k: v for k, v in tools.items() if v}},
            checks={"trtllm_build": checks, "conversion": converted.read_json("conversion.json")},
        )

    def convert(self, checkpoint: Checkpoint, cache: StageCache) -> StageResult:
        """TensorRT-LLM's checkpoint, which needs no card."""
        return convert_trtllm(
            checkpoint.dir, checkpoint.digest, cache, dtype=self.dtype, kv_fp8=self._kv_fp8
        )

    def _place(self, target: Target) -> ToolHost:
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
        self, converted_dir: Path, out: Path, place: ToolHost, timing: Path, log_path: Path
    ) -> dict[str, Any]:
        """Fill `out / ENGINE`; returns its effective values.

        `timing` holds the kernels that builds in the same environment have timed; it may not exist.
        It is replaced by one rename: who reads it has an old one or a new one.
        """
        checkpoint = Shared(name=CHECKPOINT, source=converted_dir)
        known = Shared(name="known", source=timing.parent)
        engine = Shared(name=ENGINE, source=out / ENGINE, read_only=False)
        kernels = Shared(name=TIMING, source=out / TIMING, read_only=False)
        engine.source.mkdir()
        kernels.source.mkdir()
        lent = [known] if timing.is_file() else []
        command = build_command(
            self.limits,
            self.plugins,
            opt_num_tokens=self.opt_num_tokens,
            checkpoint_dir=place.path(checkpoint),
            engine_dir=place.path(engine),
            timing_cache_in=f"{place.path(known)}/{timing.name}" if lent else None,
            timing_cache_out=f"{place.path(kernels)}/{timing.name}",
        )
        place.run(
            command,
            (checkpoint, engine, kernels, *lent),
            stage="compile",
            log_path=log_path,
            timeout_s=self.timeout_s,
            explain=explain,
        )
        config = json.loads((converted_dir / "config.json").read_text())
        expected = expected_config(self.limits, self.opt_num_tokens, self.plugins, config)
        effective = read_back(engine.source, expected)
        written = kernels.source / timing.name
        if written.is_file() and written.stat().st_size > 0:
            timing.parent.mkdir(parents=True, exist_ok=True)
            written.replace(timing)
        shutil.rmtree(kernels.source)
        return effective


def _write_versions(path: str) -> None:
    """Write the versions of what builds the engine as JSON.

    Its source is run by the interpreter that has TensorRT-LLM, where this project need not be
    installed: it imports the standard library only, and nothing that touches a GPU.
    """
    import contextlib
    import importlib.metadata
    import importlib.util
    import json
    import runpy
    from pathlib import Path

    found = {"tensorrt_llm": "", "tensorrt": "", "cuda": ""}
    for name in ("tensorrt_llm", "tensorrt"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if not found["tensorrt"]:  # the image's own build of it may have left no record for pip
        with contextlib.suppress(ImportError):
            found["tensorrt"] = str(importlib.import_module("tensorrt").__version__)
    torch = importlib.util.find_spec("torch")
    if torch is not None and torch.origin is not None:
        version_file = Path(torch.origin).parent / "version.py"
        if version_file.is_file():
            found["cuda"] = str(runpy.run_path(str(version_file)).get("cuda") or "")
    Path(path).write_text(json.dumps(found))


PROBE = f"{inspect.getsource(_write_versions)}\nimport sys\n_write_versions(sys.argv[1])\n"
"""Program for `python3 -P -c`; its argument is the file to write."""


def probe_environment(place: ToolHost, target: Target, log_path: Path) -> dict[str, str | int]:
    """What shapes an engine beside its inputs, and the driver; a version is empty if unknown."""
    with tempfile.TemporaryDirectory(prefix="enginesmith-probe-") as folder:
        answers = Shared(name="answers", source=Path(folder), read_only=False)
        place.run(
            [place.python, "-P", "-c", PROBE, f"{place.path(answers)}/versions.json"],
            [answers],
            stage="probe",
            log_path=log_path,
            timeout_s=_PROBE_TIMEOUT_S,
        )
        versions = json.loads((Path(folder) / "versions.json").read_text())
    if versions["tensorrt_llm"] != VERSION or not versions["tensorrt"]:
        where = f"the image {place.image_digest}" if place.image_digest else "this machine"
        raise IncompatibleError(
            f"compiler=trtllm needs TensorRT-LLM {VERSION} with its TensorRT; {where} has "
            f"TensorRT-LLM {versions['tensorrt_llm'] or 'none'} and TensorRT "
            f"{versions['tensorrt'] or 'none'}; use the build image (make image)"
        )
    return {
        **versions,
        "card": target.card,
        "sm": target.sm,
        "driver": place.gpu.driver if place.gpu else "",
        "image": place.image_digest,
    }


KIND = TrtLlmCompiler
