"""A stranger on a CUDA device: whatever NVML lists in this container, its work is seen."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from pipeline.acceptance.card import disturbance, held_card
from pipeline.core.gpu import nvml_device, read_conditions

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
