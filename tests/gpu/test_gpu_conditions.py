"""A CUDA device: a stranger's work is seen whatever NVML lists here, and copies are in order."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.acceptance.card import disturbance, held_card
from pipeline.core.gpu import nvml_device, read_conditions
from pipeline.runners.tensorrt_rtx import CudaDevice

pytestmark = pytest.mark.gpu

WORK = """
import torch
matrix = torch.ones(4096, 4096, device="cuda", dtype=torch.float16)
print("working", flush=True)
while True:
    matrix @ matrix
    torch.cuda.synchronize()
"""


def listed() -> bool:
    """Whether NVML shows processes in this container; a stranger runs when this is asked."""
    with nvml_device() as device:
        assert device is not None
        nvml, handle = device
        return bool(nvml.nvmlDeviceGetComputeRunningProcesses(handle))


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[str]]:
    """Another process that keeps the card busy."""
    with subprocess.Popen([sys.executable, "-c", WORK], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline().strip() == "working"
        yield other
        other.kill()


@pytest.mark.parametrize("ours", ["nothing", "initialised", "context"])
def test_a_stranger_makes_a_measurement_inconclusive_until_it_has_ended(
    stranger: subprocess.Popen[str], ours: str
) -> None:
    if ours == "initialised":
        torch.cuda.init()  # type: ignore[no-untyped-call]
    if ours == "context":
        torch.ones(1, device="cuda")
    with held_card() as held:
        print(ours, held.before)
        assert disturbance(held.before) is not None
        assert disturbance(dataclasses.replace(held.before, other_compute_processes=None))
        assert disturbance(dataclasses.replace(held.before, utilization_percent=0)) or not listed()
        stranger.kill()
        stranger.wait()
    print(held.after)
    assert [finding.kind for finding in held.findings()] == ["inconclusive"]
    quiet = read_conditions()
    assert quiet is not None
    assert disturbance(quiet) is None


def test_a_copy_from_a_card_is_there_when_the_stream_is_synchronized() -> None:
    device = CudaDevice()
    assert device.stream == torch.cuda.current_stream().cuda_stream != 0
    ids: Any = device.zeros(10, "int64")
    device.upload(np.array([[1, 2], [3, 4]]), ids)
    assert ids.tolist() == [1, 2, 3, 4, 0, 0, 0, 0, 0, 0]
    assert device.zeros(3, "bfloat16").element_size() == 2
    values: Any = device.zeros(1 << 20, "float32")
    torch.cuda._sleep(10**9)  # type: ignore[no-untyped-call]  # cycles: half a second or more
    values += 7
    copied = device.download(values, (1 << 18, 2))
    assert not torch.cuda.current_stream().query()  # nothing has waited yet
    device.synchronize()
    assert (copied == 7).all()
