"""The command line of `trtllm-build` 1.2.1; pure.

Flags and values are those of `tensorrt_llm/commands/build.py` and `plugin/plugin.py` of the 1.2
line; `tests/formats/trtllm/trtllm_build_options.json` lists them all, and a test holds every
command against that list. What is left out on purpose:

- `--max_input_len`: ignored where padding is removed and context FMHA is on, as here.
- `--kv_cache_type`: paged is the default; the engine's config is read back.
- `--build_config`: a JSON file with it would silence the size flags.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.formats.trtllm.plugins import Plugins
from pipeline.formats.trtllm.release import BUILD_PROGRAM

CHECKPOINT, ENGINE, TIMING_IN, TIMING_OUT = "checkpoint", "engine", "timing-in", "timing-out"
"""Names of the folders that the command sees."""
TIMING_CACHE_FILE = "model.cache"


@dataclass(frozen=True, kw_only=True)
class BuildSizes:
    """Sizes of an engine.

    Attributes:
        max_batch_size: Requests at once.
        max_seq_len: Prompt + output tokens of one request.
        max_num_tokens: Tokens of one iteration, prefill chunks included.
        opt_num_tokens: Token count that kernels are chosen for; None with several profiles, or for
            `max_batch_size`.
    """

    max_batch_size: int
    max_seq_len: int
    max_num_tokens: int
    opt_num_tokens: int | None


@dataclass(frozen=True, kw_only=True)
class BuildPaths:
    """Paths as the tool sees them.

    Attributes:
        checkpoint_dir: TensorRT-LLM checkpoint.
        engine_dir: Gets the engine.
        timing_cache_in: An existing timing cache, or None: a path without a file only earns a
            warning.
        timing_cache_out: Gets the new one. Without this flag it lands in the working directory.
    """

    checkpoint_dir: str
    engine_dir: str
    timing_cache_in: str | None
    timing_cache_out: str


def build_command(
    sizes: BuildSizes, plugins: Plugins, kv_cache_dtype: str, paths: BuildPaths
) -> tuple[str, ...]:
    """Program and arguments, never a shell string."""
    command = [
        BUILD_PROGRAM,
        *("--checkpoint_dir", paths.checkpoint_dir),
        *("--output_dir", paths.engine_dir),
        *("--max_batch_size", str(sizes.max_batch_size)),
        *("--max_seq_len", str(sizes.max_seq_len)),
        *("--max_num_tokens", str(sizes.max_num_tokens)),
        *("--max_beam_width", "1"),
    ]
    if sizes.opt_num_tokens is not None:
        command += ["--opt_num_tokens", str(sizes.opt_num_tokens)]
    command += plugins.arguments(kv_cache_dtype)
    if paths.timing_cache_in is not None:
        command += ["--input_timing_cache", paths.timing_cache_in]
    command += ["--output_timing_cache", paths.timing_cache_out]
    command += ["--workers", "1", "--log_level", "info"]
    return tuple(command)


def example_command(sizes: BuildSizes, plugins: Plugins, kv_cache_dtype: str) -> tuple[str, ...]:
    """The command with paths relative to a folder that holds the checkpoint: for records and docs.

    It leaves out the machine's own folders, so that it is equal wherever it is made.
    """
    paths = BuildPaths(
        checkpoint_dir=CHECKPOINT,
        engine_dir=ENGINE,
        timing_cache_in=None,
        timing_cache_out=TIMING_CACHE_FILE,
    )
    return build_command(sizes, plugins, kv_cache_dtype, paths)
