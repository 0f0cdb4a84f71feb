"""The command line, held against the list of what `trtllm-build` 1.2 takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.values import Limits
from pipeline.formats.trtllm.build_tool import build_command
from tests.formats.trtllm.settings import ADA_PLUGINS, compiler

OPTIONS: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_name("trtllm_build_options.json").read_text()
)["options"]

VARIANTS = {
    "fp8-cache": compiler(),
    "16-bit-cache": compiler(kv_cache_dtype="bfloat16"),
    "one-profile": compiler({"multiple_profiles": False}, opt_num_tokens=64),
    "every-switch-off": compiler(
        {
            "gemm_plugin": "auto",
            "use_fused_mlp": False,
            "use_paged_context_fmha": False,
            "multiple_profiles": False,
        }
    ),
}


def faults(command: tuple[str, ...]) -> list[str]:
    """Everything in a command that the real parser would refuse."""
    found = []
    arguments = list(command[1:])
    while arguments:
        name = arguments.pop(0)
        kind = OPTIONS.get(name)
        if kind is None:
            found.append(f"{name} is no option")
            continue
        if kind.get("type") == "switch":
            continue
        value = arguments.pop(0) if arguments else "nothing"
        if "choices" in kind and value not in kind["choices"]:
            found.append(f"{name} takes {kind['choices']}, not {value}")
        if kind.get("type") == "int" and not value.isdigit():
            found.append(f"{name} takes a number, not {value}")
    return found


@pytest.mark.parametrize("name", VARIANTS)
def test_every_flag_and_value_is_one_that_release_1_2_takes(name: str) -> None:
    assert faults(VARIANTS[name].command) == []


def test_command_for_phi3_on_an_rtx_4090() -> None:
    limits = Limits(max_batch_size=64, max_seq_len=4096, max_num_tokens=8192, kv_cache_dtype="fp8")
    command = build_command(
        limits,
        ADA_PLUGINS,
        checkpoint_dir="/mnt/checkpoint",
        engine_dir="/mnt/engine",
        timing_cache_in="/mnt/timing-in/model.cache",
        timing_cache_out="/mnt/timing-out/model.cache",
    )
    assert command == (
        "trtllm-build",
        *("--checkpoint_dir", "/mnt/checkpoint"),
        *("--output_dir", "/mnt/engine"),
        *("--max_batch_size", "64"),
        *("--max_seq_len", "4096"),
        *("--max_num_tokens", "8192"),
        *("--max_beam_width", "1"),
        *("--gemm_plugin", "disable"),
        *("--context_fmha", "enable"),
        *("--remove_input_padding", "enable"),
        *("--use_fused_mlp", "enable"),
        *("--use_paged_context_fmha", "enable"),
        *("--use_fp8_context_fmha", "enable"),
        *("--multiple_profiles", "enable"),
        *("--tokens_per_block", "32"),
        *("--input_timing_cache", "/mnt/timing-in/model.cache"),
        *("--output_timing_cache", "/mnt/timing-out/model.cache"),
        *("--workers", "1"),
        *("--log_level", "info"),
    )


def test_ignored_and_silencing_flags_are_left_out() -> None:
    for variant in VARIANTS.values():
        assert not {"--max_input_len", "--build_config", "--kv_cache_type"} & set(variant.command)
