"""What to change when TensorRT-LLM fails, for the causes that its log tells; pure.

Warnings about single kernels ("Skipping tactic ... insufficient memory") are no cause: builds that
end well print them too (TensorRT-LLM issue 493).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_TAIL_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Cause:
    """One known failure.

    Attributes:
        pattern: Found in the log of such a failure.
        hint: What happened and what to change; may use the pattern's groups.
        source: Where the message comes from.
    """

    pattern: str
    hint: str
    source: str


CAUSES = (
    Cause(
        pattern=r"Required but not provided tensors",
        hint="the TensorRT-LLM checkpoint lacks tensors that its architecture needs: a fault of "
        "the converter, or of the checkpoint that it was given; please report it with the model's "
        "config.json",
        source="PretrainedModel.load in models/modeling_utils.py; TensorRT-LLM issue 1677",
    ),
    Cause(
        pattern=r"Encounter error .*not the same shape as the original.*for parameter '([^']+)'",
        hint=r"tensor \1 of the TensorRT-LLM checkpoint has another shape than its config says; "
        "make the checkpoint again, and report it if it stays",
        source="Parameter.value in parameter.py, wrapped in models/modeling_utils.py",
    ),
    Cause(
        pattern=r"Unsupported model architecture: (\w+)",
        hint=r"TensorRT-LLM's engine backend does not know \1; use compiler=checkpoint",
        source="build_model in commands/build.py",
    ),
    Cause(
        pattern=r"incompatible device, expecting compute ([\d.]+) got compute ([\d.]+)",
        hint=r"the engine is for another GPU generation (compute \2 and \1); build it on the card "
        "that it is for",
        source="llama_index issue 12318, TensorRT-LLM issue 3031",
    ),
    Cause(
        pattern=r"not compatible with this version of TensorRT, expecting library version "
        r"([\d.]+) got ([\d.]+)",
        hint=r"the engine is of another TensorRT (versions \2 and \1); run it with the release "
        "that built it, which its manifest names, or build it again",
        source="TensorRT issue 574, wang-xinyu/tensorrtx issue 664",
    ),
    Cause(
        pattern=r"using different TensorRT[- ]LLM version",
        hint="the engine's plugins are of another TensorRT-LLM; run it with the release that built "
        "it, which its manifest names, or build it again",
        source="plugins' deserialization check in the C++ runtime",
    ),
    Cause(
        pattern=r"CUDA driver version is insufficient for CUDA runtime version|"
        r"driver on your system is too old",
        hint="the NVIDIA driver is too old for this release's CUDA; install a newer driver",
        source="CUDA runtime API, cudaErrorInsufficientDriver; torch.cuda",
    ),
    Cause(
        pattern=r"no CUDA-capable device is detected|No CUDA GPUs are available|"
        r"Found no NVIDIA driver on your system",
        hint="it saw no GPU: see whether nvidia-smi works here, and whether another program holds "
        "the card",
        source="CUDA runtime API, cudaErrorNoDevice; torch.cuda",
    ),
    Cause(
        pattern=r"Error Code 2: OutOfMemory|CUDA out of memory|cudaErrorMemoryAllocation|"
        r"\[E\].*Requested amount of GPU memory",
        hint="the GPU ran out of memory: end other programs on it (nvidia-smi lists them), then "
        "lower compiler.max_num_tokens or compiler.max_batch_size, or set "
        "compiler.plugins.multiple_profiles=false",
        source="TensorRT-LLM issues 346 and 102",
    ),
    Cause(
        pattern=r"No space left on device",
        hint="the disk is full; free some, or set ENGINESMITH_CACHE to a larger one",
        source="errno 28",
    ),
    Cause(
        pattern=r"unrecognized arguments|argument --\w+: invalid choice",
        hint="this trtllm-build is of another release than 1.2.1: it does not know a flag; use the "
        "build image (make image)",
        source="argparse",
    ),
)

_KILLED = frozenset({-9, 137})
"""SIGKILL, as Python and as shells and Docker tell it."""


def explain(log: str, returncode: int) -> str:
    """What to change; empty for a failure that is not known.

    Args:
        log: The end of the program's output.
        returncode: Its exit code; negative for a signal.
    """
    for cause in CAUSES:
        if match := re.search(cause.pattern, log):
            return match.expand(cause.hint)
    if returncode in _KILLED:
        return (
            "it was killed (SIGKILL), most likely for host memory (dmesg tells who was killed): "
            "end other programs or add swap, and raise compiler.memory_gib if that limits it"
        )
    return ""


def explain_log(log_path: Path, returncode: int) -> str:
    """`explain` on the last megabyte of a log."""
    with log_path.open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(max(0, size - _TAIL_BYTES))
        return explain(stream.read().decode("utf-8", errors="replace"), returncode)
