"""The card's memory by way of PyTorch: on this machine its tensors, with a card all of it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.core.errors import IncompatibleError
from pipeline.runners.onnxruntime import OnnxRuntimeGraph
from pipeline.runners.trtrtx.decoder import RtxDecoder
from pipeline.runners.trtrtx.device import CudaDevice
from pipeline.runners.trtrtx.engine import LoadSettings, RtxEngine
from tests.formats.decoder.decoders import generate_greedy, random_prompt, write_graph
from tests.runners.trtrtx.engines import CONTEXT, MAX_BATCH, fake_tensorrt_rtx, write_plan
from tests.runners.trtrtx.torch_memory import share_memory

SETTINGS = LoadSettings(kernel_specialization="eager", runtime_cache=None)
RAGGED = [random_prompt(length, seed=length) for length in (10, 1, 27, 3, 16)]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> CudaDevice:
    """PyTorch's tensors in this machine's memory; streams and page locks are left out."""
    zeros, empty = torch.zeros, torch.empty
    stream = SimpleNamespace(cuda_stream=0x77, synchronize=lambda: None)

    def host_zeros(count: int, **options: Any) -> Any:
        # PyTorch aligns to 64 bytes here, on a card to 512.
        assert options.pop("device") == "cuda"
        whole = zeros(count + 256, **options)
        start = -whole.data_ptr() % 256 // whole.element_size()
        return whole[start : start + count]

    def pageable(shape: tuple[int, ...], *, dtype: Any, pin_memory: bool) -> Any:
        assert pin_memory
        return empty(shape, dtype=dtype)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    monkeypatch.setattr(torch, "zeros", host_zeros)
    monkeypatch.setattr(torch, "empty", pageable)
    return CudaDevice()


def check_same_tokens(
    device: CudaDevice,
    model_dir: Path,
    folder: Path,
    graph: OnnxRuntimeGraph,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Greedy tokens of the stand-in on the device's memory, against the graph's own."""
    fake = fake_tensorrt_rtx()
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake)
    share_memory(fake, device, monkeypatch)
    file = write_graph(model_dir, folder / "graph", context=CONTEXT)
    engine = RtxEngine(write_plan(file, folder), device, SETTINGS)
    for prompts in (RAGGED, RAGGED[:1]):
        tokens = generate_greedy(RtxDecoder(engine, len(prompts)), prompts, 12)
        wanted = generate_greedy(graph.bind(len(prompts)), prompts, 12)
        np.testing.assert_array_equal(tokens, wanted)
    halved = RtxEngine(write_plan(file, folder, cache="BF16"), device, SETTINGS)
    assert generate_greedy(RtxDecoder(halved, MAX_BATCH), RAGGED, 12).shape == (MAX_BATCH, 12)


def test_the_decode_loop_runs_on_tensors_of_pytorch(
    device: CudaDevice,
    model_dir: Path,
    tmp_path: Path,
    graph: OnnxRuntimeGraph,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_same_tokens(device, model_dir, tmp_path, graph, monkeypatch)


def test_copies_take_the_start_of_a_buffer(device: CudaDevice) -> None:
    ids: Any = device.zeros(10, "int64")
    device.upload(np.array([[1, 2], [3, 4]]), ids)
    assert ids.tolist() == [1, 2, 3, 4, 0, 0, 0, 0, 0, 0]
    logits: Any = device.zeros(10, "float32")
    logits[:] = torch.arange(10)
    assert device.download(logits, (2, 1, 3)).tolist() == [[[0, 1, 2]], [[3, 4, 5]]]


def test_no_card_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(IncompatibleError, match=r"sees no CUDA device.*runner=onnxruntime"):
        CudaDevice()


@pytest.mark.gpu
def test_the_decode_loop_runs_on_the_memory_of_a_card(
    model_dir: Path, tmp_path: Path, graph: OnnxRuntimeGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory and the stream only: what computes is the stand-in, on the CPU."""
    device = CudaDevice()
    assert device.stream == torch.cuda.current_stream().cuda_stream != 0
    check_same_tokens(device, model_dir, tmp_path, graph, monkeypatch)


@pytest.mark.gpu
def test_a_copy_from_a_card_is_there_when_the_stream_is_synchronized() -> None:
    device = CudaDevice()
    values: Any = device.zeros(1 << 20, "float32")
    torch.cuda._sleep(10**9)  # type: ignore[no-untyped-call]  # cycles: half a second or more
    values += 7
    copied = device.download(values, (1 << 20,))
    assert not torch.cuda.current_stream().query()  # nothing has waited yet
    device.synchronize()
    assert (copied == 7).all()
