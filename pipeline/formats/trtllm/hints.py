"""What to change when TensorRT-LLM fails, for the causes that its log shows; pure.

Warnings about single kernels ("Skipping tactic ... insufficient memory") are no cause: builds that
end well print them too (TensorRT-LLM issue 493).
"""

from __future__ import annotations

import re
from pathlib import Path

_TAIL_BYTES = 1 << 20

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
were found. Above each, where its message comes from."""

_KILLED = frozenset({-9, 137})
"""SIGKILL, as Python, and as shells and Docker report it."""


def explain(log: str, returncode: int) -> str:
    """What to change; empty for a failure that is not known.

    Args:
        log: The end of the program's output.
        returncode: Its exit code; negative for a signal.
    """
    for pattern, hint in CAUSES.items():
        if match := re.search(pattern, log):
            return match.expand(hint)
    if returncode in _KILLED:
        return (
            "it was killed (SIGKILL), most likely for host memory (see dmesg): "
            "end other programs or add swap, and raise compiler.memory_gib if that limits it"
        )
    return ""


def explain_log(log_path: Path, returncode: int) -> str:
    """`explain` on the last megabyte of a log."""
    with log_path.open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(max(0, size - _TAIL_BYTES))
        return explain(stream.read().decode("utf-8", errors="replace"), returncode)
