"""Lets the stand-in for TensorRT-RTX work on PyTorch's memory, a card's among it."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from pipeline.runners.trtrtx.device import CudaDevice


class _Now(list[Callable[[], None]]):
    """A queue whose work is done at once: it starts with a copy on PyTorch's current stream."""

    def append(self, task: Callable[[], None]) -> None:
        task()


def share_memory(fake: ModuleType, device: CudaDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let engines of `fake` read and write what `device` allocates from now on."""
    import torch

    tensors: list[Any] = []
    allocate = device.zeros

    def zeros(count: int, dtype: str) -> Any:
        tensors.append(allocate(count, dtype))
        return tensors[-1]

    def part(address: int, shape: tuple[int, ...]) -> Any:
        for tensor in tensors:
            start = (address - tensor.data_ptr()) // tensor.element_size()
            if start >= 0 and start + math.prod(shape) <= tensor.numel():
                return tensor[start : start + math.prod(shape)].view(shape)
        raise RuntimeError(f"illegal memory access at {address:#x}")

    def load(address: int, shape: tuple[int, ...], dtype: Any) -> Any:
        values = part(address, shape)
        assert str(values.dtype) == f"torch.{TORCH_TYPES[dtype.name]}"
        return (values if values.dtype == torch.int64 else values.float()).cpu().numpy().copy()

    def store(address: int, values: Any, dtype: Any) -> None:
        target = part(address, values.shape)
        assert str(target.dtype) == f"torch.{TORCH_TYPES[dtype.name]}"
        target.copy_(torch.from_numpy(values))

    monkeypatch.setattr(device, "zeros", zeros)
    monkeypatch.setattr(fake, "_load", load)
    monkeypatch.setattr(fake, "_store", store)
    monkeypatch.setitem(fake._streams, device.stream, _Now())


TORCH_TYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64"}
