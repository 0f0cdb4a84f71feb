"""`trtllm-build` 1.2.1: its command line, what its log means, and what it wrote; pure.

Flags and values are those of `tensorrt_llm/commands/build.py` and `plugin/plugin.py` of the 1.2
line; a test holds every command against the list in `trtllm_build_options.json`. Left out on
purpose: `--max_input_len` (ignored where padding is removed and context FMHA is on, as here),
`--kv_cache_type` (paged is the default) and `--build_config` (it would silence the size flags).

The tool changes values that do not go together and only warns (attention rules and size checks of
`builder.py`, `check_max_num_tokens` in `_common.py`); the effective ones stand in the engine's
`config.json`: `version`, `pretrained_config` (the checkpoint's config as it was understood) and
`build_config` with its `plugin_config`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from pipeline.core.errors import PipelineError
from pipeline.core.settings import STRICT
from pipeline.core.values import Limits
from pipeline.formats.trtllm.spec import BUILD_PROGRAM, VERSION

CHECKPOINT, ENGINE, TIMING = "checkpoint", "engine", "timing"
"""Names of the folders that the command sees."""
TIMING_CACHE_FILE = "model.cache"
ENGINE_FILE, CONFIG_FILE = "rank0.engine", "config.json"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Plugins:
    """Kernel choices, `plugin_config` to TensorRT-LLM; `conf/compiler/trtllm.yaml` has reasons.

    Prefill attention is in FP8 exactly where the cache is: with a paged context TensorRT-LLM would
    change anything else, and only warn (`build()` in builder.py).
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


def build_command(
    limits: Limits,
    plugins: Plugins,
    *,
    opt_num_tokens: int | None = None,
    checkpoint_dir: str = CHECKPOINT,
    engine_dir: str = ENGINE,
    timing_cache_in: str | None = None,
    timing_cache_out: str = TIMING_CACHE_FILE,
) -> tuple[str, ...]:
    """Program and arguments, never a shell string; paths as the tool sees them.

    `opt_num_tokens` is the token count that kernels are chosen for: None with several profiles, or
    for `max_batch_size`. `timing_cache_in` exists or is None: a path without a file only earns a
    warning. Without a flag for it the new one would land in the working directory.
    """
    flags: dict[str, str | bool | int | None] = {
        "checkpoint_dir": checkpoint_dir,
        "output_dir": engine_dir,
        **_sizes(limits, opt_num_tokens),
        **plugins.effective(limits.kv_cache_dtype),
        **({} if timing_cache_in is None else {"input_timing_cache": timing_cache_in}),
        "output_timing_cache": timing_cache_out,
        "workers": 1,
        "log_level": "info",
    }
    words = {True: "enable", False: "disable", None: "disable"}
    command = [BUILD_PROGRAM]
    for name, value in flags.items():
        word = words[value] if value is None or isinstance(value, bool) else str(value)
        command += [f"--{name}", word]
    return tuple(command)


def _sizes(limits: Limits, opt_num_tokens: int | None) -> dict[str, int]:
    """Flags of the command, and keys of the engine's `build_config`."""
    return {
        "max_batch_size": limits.max_batch_size,
        "max_seq_len": limits.max_seq_len,
        "max_num_tokens": limits.max_num_tokens,
        "max_beam_width": 1,
        **({} if opt_num_tokens is None else {"opt_num_tokens": opt_num_tokens}),
    }


_MODEL_KEYS = (
    "architecture",
    "dtype",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_size",
    "vocab_size",
    "max_position_embeddings",
    "norm_epsilon",
    "attn_bias",
    "mlp_bias",
    "rotary_base",
    "rotary_pct",
    "rotary_scaling",
)
"""Keys of a checkpoint's config that must come out as they went in; most of them have a silent
default (`PretrainedConfig` and its subclasses, models/*/config.py)."""

_MISSING = object()


def expected_config(
    limits: Limits, opt_num_tokens: int | None, plugins: Plugins, checkpoint: Mapping[str, Any]
) -> dict[str, Any]:
    """Dotted path -> value of what must be so in the engine's config; `checkpoint`: its config."""
    build = _sizes(limits, opt_num_tokens) | {"kv_cache_type": "PAGED", "strongly_typed": True}
    model = {key: checkpoint[key] for key in _MODEL_KEYS if key in checkpoint} | {
        "quantization.quant_algo": "FP8",
        "quantization.kv_cache_quant_algo": "FP8" if limits.kv_cache_dtype == "fp8" else None,
    }
    sections = {
        "pretrained_config": model,
        "build_config": build,
        "build_config.plugin_config": plugins.effective(limits.kv_cache_dtype),
    }
    expected: dict[str, Any] = {"version": VERSION}
    for section, values in sections.items():
        expected |= {f"{section}.{key}": value for key, value in values.items()}
    return expected


def read_back(engine_dir: Path, expected: Mapping[str, Any]) -> dict[str, Any]:
    """Check a finished engine folder, and take this machine's folders out of its config.

    Returns the effective values, by dotted path; PipelineError names a file that is missing, or
    each value that differs, with both.
    """
    engine = engine_dir / ENGINE_FILE
    if not engine.is_file() or engine.stat().st_size == 0:
        raise PipelineError(f"trtllm-build ended well, but wrote no {ENGINE_FILE}; see its log")
    try:
        config = json.loads((engine_dir / CONFIG_FILE).read_text())
    except (OSError, ValueError) as error:
        raise PipelineError(f"trtllm-build wrote no readable {CONFIG_FILE}: {error}") from error
    effective = {path: _at(config, path) for path in expected}
    differences = [
        f"  {path}: asked {_show(value)}, got {_show(effective[path])}"
        for path, value in expected.items()
        if not _same(effective[path], value)
    ]
    if differences:
        listed = "\n".join(differences)
        raise PipelineError(
            "trtllm-build built another engine than it was asked for; it only warns of values that "
            f"it changes (see its log):\n{listed}\nchange the recipe so that it asks for what goes "
            "together"
        )
    # The runtime does not read these keys, and TensorRT-LLM itself leaves out others that say
    # nothing about the engine (`EngineConfig.to_dict`).
    for key in ("input_timing_cache", "output_timing_cache"):
        config["build_config"][key] = None
    (engine_dir / CONFIG_FILE).write_text(json.dumps(config, indent=4) + "\n")
    return effective


def _at(config: Mapping[str, Any], path: str) -> Any:
    node: Any = config
    for part in path.split("."):
        node = node.get(part, _MISSING) if isinstance(node, Mapping) else _MISSING
    return node


def _same(found: Any, wanted: Any) -> bool:
    """Equal values: 10000 is 10000.0, True is no 1, words (enums) whatever their case."""
    if isinstance(found, bool) or isinstance(wanted, bool):
        return found is wanted
    if isinstance(found, str) and isinstance(wanted, str):
        return found.casefold() == wanted.casefold()
    if isinstance(found, int | float) and isinstance(wanted, int | float):
        return math.isclose(found, wanted, rel_tol=1e-9)
    return bool(found == wanted)


def _show(value: Any) -> str:
    return "missing" if value is _MISSING else json.dumps(value)


CAUSES = {
    # PretrainedModel.load in models/modeling_utils.py; TensorRT-LLM issue 1677
    r"Required but not provided tensors": (
        "the TensorRT-LLM checkpoint lacks tensors that its architecture needs: a fault of "
        "the converter, or of the checkpoint that it was given; please report it with the model's "
        "config.json"
    ),
    # Parameter.value in parameter.py, wrapped in models/modeling_utils.py
    r"Encounter error .*not the same shape as the original.*for parameter '([^']+)'": (
        r"tensor \1 of the TensorRT-LLM checkpoint has another shape than its config says; "
        "make the checkpoint again, and report it if it stays"
    ),
    # build_model in commands/build.py
    r"Unsupported model architecture: (\w+)": (
        r"TensorRT-LLM's engine backend does not know \1; use compiler=checkpoint"
    ),
    # CUDA runtime API, cudaErrorInsufficientDriver; torch.cuda
    (
        r"CUDA driver version is insufficient for CUDA runtime version|"
        r"driver on your system is too old"
    ): "the NVIDIA driver is too old for this release's CUDA; install a newer driver",
    # CUDA runtime API, cudaErrorNoDevice; torch.cuda
    (
        r"no CUDA-capable device is detected|No CUDA GPUs are available|"
        r"Found no NVIDIA driver on your system"
    ): (
        "it saw no GPU: see whether nvidia-smi works here, and whether another program holds "
        "the card"
    ),
    # TensorRT-LLM issues 346 and 102
    (
        r"Error Code 2: OutOfMemory|CUDA out of memory|cudaErrorMemoryAllocation|"
        r"\[E\].*Requested amount of GPU memory"
    ): (
        "the GPU ran out of memory: end other programs on it (nvidia-smi lists them), then "
        "lower compiler.max_num_tokens or compiler.max_batch_size, or set "
        "compiler.plugins.multiple_profiles=false"
    ),
    # errno 28
    r"No space left on device": (
        "the disk is full; free some, or set ENGINESMITH_CACHE to a larger one"
    ),
    # argparse
    r"unrecognized arguments|argument --\w+: invalid choice": (
        "this trtllm-build is of another release than 1.2.1: it does not know a flag; use the "
        "build image (make image)"
    ),
}
"""What is found in the log of a failure -> what happened and what to change, with the groups that
were found. Above each, where its message comes from. Warnings about single kernels ("Skipping
tactic ... insufficient memory") are no cause: builds that end well print them too (TensorRT-LLM
issue 493)."""

_KILLED = frozenset({-9, 137})
"""SIGKILL, as Python, and as shells and Docker report it."""
_TAIL_BYTES = 1 << 20


def explain(log_path: Path, returncode: int) -> str:
    """What to change after a failure, by the end of its log; empty for one that is not known."""
    with log_path.open("rb") as stream:
        stream.seek(max(0, stream.seek(0, 2) - _TAIL_BYTES))
        log = stream.read().decode("utf-8", errors="replace")
    for pattern, hint in CAUSES.items():
        if match := re.search(pattern, log):
            return match.expand(hint)
    if returncode in _KILLED:
        return (
            "it was killed (SIGKILL), most likely for host memory (see dmesg): "
            "end other programs or add swap, and raise compiler.memory_gib if that limits it"
        )
    return ""
