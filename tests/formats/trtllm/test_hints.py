"""Known failures by the lines that real logs have; each snippet names where it was seen."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.formats.trtllm.build_tool import CAUSES, explain

SNIPPETS = {
    # TensorRT-LLM issue 1677
    "RuntimeError: Required but not provided tensors:{'transformer.layers.61.attention.qkv.per_"
    "channel_scale'}": "lacks tensors",
    # parameter.py and modeling_utils.py
    "RuntimeError: Encounter error 'The value updated is not the same shape as the original. "
    "Updated: (64, 32), original: (64, 64)' for parameter 'transformer.layers.0.mlp.fc.weight'": (
        "transformer.layers.0.mlp.fc.weight of the TensorRT-LLM checkpoint has another shape"
    ),
    # commands/build.py
    "AssertionError: Unsupported model architecture: Gemma4ForCausalLM": (
        "does not know Gemma4ForCausalLM; use compiler=checkpoint"
    ),
    # TensorRT-LLM issue 346
    "[TRT] [E] 2: [virtualMemoryBuffer.cpp::resizePhysical::140] Error Code 2: OutOfMemory (no "
    "further information)": "lower compiler.max_num_tokens",
    # PyTorch
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.": "nvidia-smi lists",
    "RuntimeError: No CUDA GPUs are available": "it saw no GPU",
    "CUDA error: CUDA driver version is insufficient for CUDA runtime version": "driver is too old",
    "OSError: [Errno 28] No space left on device": "ENGINESMITH_CACHE",
    # argparse
    "trtllm-build: error: unrecognized arguments: --multiple_profiles": "another release",
}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "compile.log"


@pytest.mark.parametrize("line", SNIPPETS)
def test_known_cause_says_what_to_change(line: str, log: Path) -> None:
    log.write_text(f"[TRT-LLM] [I] Build TensorRT engine\n{line}\nmore output\n")
    assert SNIPPETS[line] in explain(log, 1)


def test_every_cause_has_a_snippet() -> None:
    for pattern in CAUSES:
        assert any(re.search(pattern, line) for line in SNIPPETS), pattern


def test_skipped_kernel_and_unknown_failure_are_no_cause(log: Path) -> None:
    """Builds that end well print this (TensorRT-LLM issues 493 and 436)."""
    log.write_text(
        "[TRT] [W] Tactic Device request: 66048MB Available: 32510MB. Device memory is insufficient"
        " to use tactic.\n[TRT] [W] UNSUPPORTED_STATESkipping tactic 4 due to insufficient memory "
        "on requested size of 66048 detected for tactic 0x000000000000001f.\n"
        "[TRT] [W] Requested amount of GPU memory (33555480576 bytes) could not be allocated.\n"
        "Traceback\nKeyError: 'x'\n"
    )
    assert explain(log, 1) == ""


@pytest.mark.parametrize("returncode", [-9, 137])
def test_killed_process_points_to_host_memory(returncode: int, log: Path) -> None:
    log.write_text("loading\n")
    assert "compiler.memory_gib" in explain(log, returncode)


def test_cause_is_found_at_the_end_of_a_long_log(log: Path) -> None:
    log.write_bytes(b"\xff progress\n" * 200_000 + b"CUDA out of memory\n")
    assert "ran out of memory" in explain(log, 1)
