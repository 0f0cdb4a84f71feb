"""TensorRT-LLM engines of one release, built by `trtllm-build` on the card that they are for."""

from __future__ import annotations

from pipeline.core.values import Limits
from pipeline.formats.spec import PAGED, CompileMemory, FormatSpec
from pipeline.formats.trtllm.layout import buildable_layer

NAME = "tensorrt-llm"
VERSION = "1.2.1"
"""The last final release whose engines exist: the engine backend was removed in the 1.3 line
(TensorRT-LLM PRs 15918 and 16369; pins of 1.3.0rc22 on PyPI)."""
BUILD_PROGRAM = "trtllm-build"
CUDA = "13.1"
"""CUDA in the release image: README badge of 1.2.1 (PyPI sdist), base image pytorch:25.12."""
OLDEST_DRIVER = 580
"""Major version of the oldest NVIDIA driver (Linux) that runs any release of CUDA 13; NVIDIA's
forward compatibility package is not counted on, since GeForce cards cannot use it. Source: CUDA
Compatibility, "Minor Version Compatibility", table 1,
https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html"""


def _serve_args(limits: Limits) -> tuple[str, ...]:
    """As `trtllm-serve` spells them."""
    return (
        *("--backend", "tensorrt"),
        *("--max_batch_size", str(limits.max_batch_size)),
        *("--max_num_tokens", str(limits.max_num_tokens)),
    )


SPEC = FormatSpec(
    name="trtllm",
    runtime=NAME,
    holds=lambda precision: precision.quant_algo in (None, "FP8"),  # what the converter writes
    kv_cache_dtypes=("fp8", "bfloat16", "float16"),
    fit=PAGED,  # its kernels are in its libraries
    bound_to="card",
    runner="trtllm",
    substitute="trtllm",
    packages=("ml_dtypes",),  # TensorRT-LLM itself is the compiler's to find: check_machine
    files=("config.json", "tokenizer*", "rank0.engine"),
    serve_args=_serve_args,
    # The weights that were read and the engine that is serialized.
    memory=CompileMemory(per_byte=2.0, source="2 x the engine, not measured"),
    check_shape=buildable_layer,
)
