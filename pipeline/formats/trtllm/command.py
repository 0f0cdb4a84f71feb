"""The command line of `trtllm-build` 1.2.1; pure.

Flags and values are those of `tensorrt_llm/commands/build.py` and `plugin/plugin.py` of the 1.2
line; `tests/formats/trtllm/trtllm_build_options.json` lists them all, and a test holds every
command against that list. What is left out on purpose:

- `--max_input_len`: ignored where padding is removed and context FMHA is on, as here.
- `--kv_cache_type`: paged is the default; the engine's config is read back.
- `--build_config`: a JSON file with it would silence the size flags.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from pipeline.core.settings import STRICT
from pipeline.core.values import Limits
from pipeline.formats.trtllm.release import BUILD_PROGRAM

CHECKPOINT, ENGINE, TIMING = "checkpoint", "engine", "timing"
"""Names of the folders that the command sees."""
TIMING_CACHE_FILE = "model.cache"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Plugins:
    """Kernel choices, `plugin_config` to TensorRT-LLM; `conf/compiler/trtllm.yaml` has reasons.

    Prefill attention is in FP8 exactly where the cache is: with a paged context TensorRT-LLM would
    change anything else, and only warn (`build()` in builder.py). The plugins for Hopper stay off,
    which is their default.

    Attributes:
        gemm_plugin: cuBLASLt for the GEMMs that are not FP8 (a 16-bit type or `auto`), or for the
            FP8 ones (`fp8`); `disable` leaves all to TensorRT.
        use_fused_mlp: gate and up as one GEMM.
        use_paged_context_fmha: Prefill reads the paged cache: needed for chunked prefill and for
            the reuse of cached prefixes.
        multiple_profiles: One optimization profile for each range of token counts.
        tokens_per_block: Tokens of one block of the paged cache.
    """

    gemm_plugin: Literal["disable", "auto", "float16", "bfloat16", "fp8"]
    use_fused_mlp: bool
    use_paged_context_fmha: bool
    multiple_profiles: bool
    tokens_per_block: PositiveInt

    def effective(self, kv_cache_dtype: str) -> Mapping[str, str | bool | int | None]:
        """Values that must stand in the engine's `plugin_config`; None for a plugin that is off."""
        return {
            "gemm_plugin": None if self.gemm_plugin == "disable" else self.gemm_plugin,
            # Not settings: without them TensorRT-LLM pads, and FP8 and paged attention are off.
            "context_fmha": True,
            "remove_input_padding": True,
            "use_fused_mlp": self.use_fused_mlp,
            "use_paged_context_fmha": self.use_paged_context_fmha,
            "use_fp8_context_fmha": kv_cache_dtype == "fp8",
            "multiple_profiles": self.multiple_profiles,
            "tokens_per_block": self.tokens_per_block,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildPaths:
    """Paths as the tool sees them; by default relative to a folder that holds the checkpoint.

    Attributes:
        checkpoint_dir: TensorRT-LLM checkpoint.
        engine_dir: Gets the engine.
        timing_cache_in: An existing timing cache, or None: a path without a file only earns a
            warning.
        timing_cache_out: Gets the new one. Without this flag it lands in the working directory.
    """

    checkpoint_dir: str = CHECKPOINT
    engine_dir: str = ENGINE
    timing_cache_in: str | None = None
    timing_cache_out: str = TIMING_CACHE_FILE


def build_command(
    limits: Limits, plugins: Plugins, paths: BuildPaths, *, opt_num_tokens: int | None = None
) -> tuple[str, ...]:
    """Program and arguments, never a shell string.

    Args:
        limits: Sizes, and the type of the cache.
        plugins: Kernel choices.
        paths: As the tool sees them.
        opt_num_tokens: Token count that kernels are chosen for; None with several profiles, or for
            `max_batch_size`.
    """
    command = [
        BUILD_PROGRAM,
        *("--checkpoint_dir", paths.checkpoint_dir),
        *("--output_dir", paths.engine_dir),
        *("--max_batch_size", str(limits.max_batch_size)),
        *("--max_seq_len", str(limits.max_seq_len)),
        *("--max_num_tokens", str(limits.max_num_tokens)),
        *("--max_beam_width", "1"),
    ]
    if opt_num_tokens is not None:
        command += ["--opt_num_tokens", str(opt_num_tokens)]
    for name, value in plugins.effective(limits.kv_cache_dtype).items():
        command += [f"--{name}", _word(value)]
    if paths.timing_cache_in is not None:
        command += ["--input_timing_cache", paths.timing_cache_in]
    command += ["--output_timing_cache", paths.timing_cache_out]
    command += ["--workers", "1", "--log_level", "info"]
    return tuple(command)


def _word(value: str | bool | int | None) -> str:
    """As the command line has it, where on and off are words."""
    if isinstance(value, bool):
        return "enable" if value else "disable"
    return "disable" if value is None else str(value)
