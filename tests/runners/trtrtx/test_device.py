"""The card's memory by way of PyTorch: on this machine its tensors, with a card all of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.core.errors import IncompatibleError
from pipeline.runners.trtrtx.device import CudaDevice


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> CudaDevice:
    """PyTorch's tensors in this machine's memory; streams and page locks are left out."""
    zeros, empty = torch.zeros, torch.empty
    stream = SimpleNamespace(cuda_stream=0x77, synchronize=lambda: None)

    def host_zeros(count: int, *, dtype: Any, device: str) -> Any:
        assert device == "cuda"
        return zeros(count, dtype=dtype)

    def pageable(shape: tuple[int, ...], *, dtype: Any, pin_memory: bool) -> Any:
        assert pin_memory
        return empty(shape, dtype=dtype)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    monkeypatch.setattr(torch, "zeros", host_zeros)
    monkeypatch.setattr(torch, "empty", pageable)
    return CudaDevice()


def test_copies_take_the_start_of_a_buffer(device: CudaDevice) -> None:
    ids: Any = device.zeros(10, "int64")
    device.upload(np.array([[1, 2], [3, 4]]), ids)
    assert ids.tolist() == [1, 2, 3, 4, 0, 0, 0, 0, 0, 0]
    logits: Any = device.zeros(10, "float32")
    logits[:] = torch.arange(10)
    assert device.download(logits, (2, 1, 3)).tolist() == [[[0, 1, 2]], [[3, 4, 5]]]
    assert device.zeros(3, "bfloat16").element_size() == 2


def test_no_card_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(IncompatibleError, match=r"sees no CUDA device.*runner=onnxruntime"):
        CudaDevice()


@pytest.mark.gpu
def test_a_copy_from_a_card_is_there_when_the_stream_is_synchronized() -> None:
    device = CudaDevice()
    assert device.stream == torch.cuda.current_stream().cuda_stream != 0
    values: Any = device.zeros(1 << 20, "float32")
    torch.cuda._sleep(10**9)  # type: ignore[no-untyped-call]  # cycles: half a second or more
    values += 7
    copied = device.download(values, (1 << 20,))
    assert not torch.cuda.current_stream().query()  # nothing has waited yet
    device.synchronize()
    assert (copied == 7).all()
