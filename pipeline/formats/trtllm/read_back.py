"""Holds what `trtllm-build` wrote against what it was asked for.

It changes values that do not go together and only warns (attention rules and size checks of
`builder.py`, `check_max_num_tokens` in `_common.py`); the effective ones stand in the engine's
`config.json`: `version`, `pretrained_config` (the checkpoint's config as it was understood) and
`build_config` with its `plugin_config`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.core.errors import PipelineError
from pipeline.core.values import Limits
from pipeline.formats.trtllm.command import Plugins
from pipeline.formats.trtllm.release import VERSION

ENGINE_FILE = "rank0.engine"
CONFIG_FILE = "config.json"

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
"""Stands for a key that is not there."""


def read_back(engine_dir: Path, expected: Mapping[str, Any]) -> dict[str, Any]:
    """Check a finished engine folder, and take this machine's folders out of its config.

    Args:
        engine_dir: What `trtllm-build` wrote.
        expected: From `expected_config`.

    Returns:
        The effective values, by dotted path, for the report.

    Raises:
        PipelineError: A file is missing, or values differ; names each with both of them.
    """
    engine = engine_dir / ENGINE_FILE
    if not engine.is_file() or engine.stat().st_size == 0:
        raise PipelineError(f"trtllm-build ended well, but wrote no {ENGINE_FILE}; see its log")
    try:
        config = json.loads((engine_dir / CONFIG_FILE).read_text())
    except (OSError, ValueError) as error:
        raise PipelineError(f"trtllm-build wrote no readable {CONFIG_FILE}: {error}") from error
    effective: dict[str, Any] = {}
    differences = []
    for path, value in expected.items():
        found = _at(config, path)
        effective[path] = found
        if not _same(found, value):
            differences.append(f"  {path}: asked {_shown(value)}, got {_shown(found)}")
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


def expected_config(
    limits: Limits, opt_num_tokens: int | None, plugins: Plugins, checkpoint: Mapping[str, Any]
) -> dict[str, Any]:
    """Dotted path -> value of everything that must be so in the engine's config.

    Args:
        limits: Sizes of the engine, and the type of its cache.
        opt_num_tokens: Token count that kernels are chosen for; None where it was left open.
        plugins: Kernel choices.
        checkpoint: Parsed `config.json` of the TensorRT-LLM checkpoint.
    """
    known = {key: checkpoint[key] for key in _MODEL_KEYS if key in checkpoint}
    fp8_cache = limits.kv_cache_dtype == "fp8"
    build = {
        "max_batch_size": limits.max_batch_size,
        "max_seq_len": limits.max_seq_len,
        "max_num_tokens": limits.max_num_tokens,
        **({} if opt_num_tokens is None else {"opt_num_tokens": opt_num_tokens}),
        "max_beam_width": 1,
        "kv_cache_type": "PAGED",
        "strongly_typed": True,
    }
    return {
        "version": VERSION,
        **{f"pretrained_config.{key}": value for key, value in known.items()},
        "pretrained_config.quantization.quant_algo": "FP8",
        "pretrained_config.quantization.kv_cache_quant_algo": "FP8" if fp8_cache else None,
        **{f"build_config.{key}": value for key, value in build.items()},
        **{
            f"build_config.plugin_config.{key}": value
            for key, value in plugins.effective(limits.kv_cache_dtype).items()
        },
    }


def _at(config: Mapping[str, Any], path: str) -> Any:
    node: Any = config
    for part in path.split("."):
        node = node.get(part, _MISSING) if isinstance(node, Mapping) else _MISSING
    return node


def _same(found: Any, wanted: Any) -> bool:
    """Equal values; numbers by value (10000 is 10000.0), but never a number for a boolean.

    Words whatever their case: enums are written by name or by value, depending on the version.
    """
    if isinstance(found, bool) or isinstance(wanted, bool):
        return found is wanted
    if isinstance(found, str) and isinstance(wanted, str):
        return found.casefold() == wanted.casefold()
    if isinstance(found, int | float) and isinstance(wanted, int | float):
        return math.isclose(found, wanted, rel_tol=1e-9)
    return bool(found == wanted)


def _shown(value: Any) -> str:
    return "missing" if value is _MISSING else json.dumps(value)
