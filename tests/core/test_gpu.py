from __future__ import annotations

import sys

import pytest

from pipeline.core.errors import IncompatibleError
from pipeline.core.gpu import find_gpu, probe_gpus
from tests.nvml import Card, nvml

H100 = Card(name="NVIDIA H100 80GB HBM3", sm=(9, 0), uuid="GPU-46de2ad6")


def test_card_of_the_sm_is_found_among_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setitem(sys.modules, "pynvml", nvml(H100, Card(sm=(12, 0)), Card(uuid="GPU-2")))
    assert [card.sm for card in probe_gpus()] == [90, 120, 89]
    assert (find_gpu(89).uuid, find_gpu(89).driver) == ("GPU-2", "580.65.06")


def test_other_cards_are_named_when_none_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml(H100, Card(name="NVIDIA GB10", sm=(12, 1))))
    with pytest.raises(IncompatibleError) as caught:
        find_gpu(89)
    assert "needs a GPU with sm_89, found NVIDIA H100 80GB HBM3 (sm_90), NVIDIA GB10 (sm_121)" in (
        str(caught.value)
    )


@pytest.mark.parametrize(
    ("fault", "way_on"),
    [
        ("RM has detected an NVML/RM version mismatch.", "reboot"),
        ("Driver Not Loaded", "sudo modprobe nvidia"),
        ("NVML Shared Library Not Found", "install the NVIDIA driver.*docker run --gpus all"),
        ("GPU is lost", ""),
        ("", "see dmesg"),
    ],
)
def test_each_failure_of_the_driver_has_its_way_on(
    monkeypatch: pytest.MonkeyPatch, fault: str, way_on: str
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml(fault=fault))
    with pytest.raises(IncompatibleError, match=f"no NVIDIA GPU here.*{fault}.*{way_on}"):
        probe_gpus()
