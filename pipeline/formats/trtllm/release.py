"""The one release of TensorRT-LLM that this package builds with, and its build image."""

from __future__ import annotations

NAME = "tensorrt-llm"
VERSION = "1.2.1"
"""The last final release whose engines exist: the engine backend was removed in the 1.3 line
(TensorRT-LLM PRs 15918 and 16369; pins of 1.3.0rc22 on PyPI)."""
BUILD_PROGRAM = "trtllm-build"
BENCH_PROGRAM = "trtllm-bench"

CUDA = "13.1"
"""CUDA in the release image: README badge of 1.2.1 (PyPI sdist), base image pytorch:25.12."""
OLDEST_DRIVER = 580
"""Major version of the oldest NVIDIA driver (Linux) that runs any release of CUDA 13; NVIDIA's
forward compatibility package is not counted on, since GeForce cards cannot use it. Source: CUDA
Compatibility, "Minor Version Compatibility", table 1,
https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html"""
SHM_BYTES = 1 << 30
"""For a container without the host's IPC namespace: what NVIDIA's framework containers ask for
with `--shm-size=1g`, since Docker's 64 MB are too small for PyTorch."""
