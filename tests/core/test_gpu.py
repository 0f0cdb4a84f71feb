from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.core import gpu as module
from pipeline.core.errors import IncompatibleError
from pipeline.core.gpu import Gpu, find_gpu, parse_gpus, probe_gpus

# As a machine with one H100 printed it on 2026-11-25.
H100 = "0, NVIDIA H100 80GB HBM3, 9.0, 81559, 580.159.04, GPU-46de2ad6-ee47-56b1-bc10-4d36fe211351"
ADA = "1, NVIDIA GeForce RTX 4090, 8.9, 24564, 580.159.04, GPU-004f693d-767b-b215-b4a9-a18af0ffd643"
NO_CONTACT = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that "
    "the latest NVIDIA driver is installed and running."
)


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a stand-in for nvidia-smi goes, the only program on the PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path / "nvidia-smi"


def prints(smi: Path, text: str, returncode: int = 0) -> None:
    smi.write_text(f"#!/bin/sh\n/bin/cat <<'END'\n{text}\nEND\nexit {returncode}\n")
    smi.chmod(0o755)


def test_line_of_a_card_is_read() -> None:
    assert parse_gpus(f"{H100}\n") == (
        Gpu(
            index=0,
            name="NVIDIA H100 80GB HBM3",
            sm=90,
            memory_bytes=81559 * 1024 * 1024,
            driver="580.159.04",
            uuid="GPU-46de2ad6-ee47-56b1-bc10-4d36fe211351",
        ),
    )


def test_sm_of_two_digits_before_the_point() -> None:
    assert parse_gpus(ADA.replace("8.9", "12.0"))[0].sm == 120


def test_what_the_driver_does_not_tell_is_none() -> None:
    (card,) = parse_gpus("0, NVIDIA GB10, [N/A], [N/A], 580.95.05, GPU-1")
    assert (card.sm, card.memory_bytes, card.name) == (None, None, "NVIDIA GB10")


@pytest.mark.parametrize("text", ["", NO_CONTACT, "No devices were found", "a, b, c, d, e, f"])
def test_text_that_is_no_card_is_left_out(text: str) -> None:
    assert parse_gpus(f"{text}\n{ADA}\n") == parse_gpus(ADA)


def test_card_of_the_sm_is_found_among_several(smi: Path) -> None:
    prints(smi, f"{H100}\n{ADA}")
    assert [card.sm for card in probe_gpus()] == [90, 89]
    assert find_gpu(89).name == "NVIDIA GeForce RTX 4090"


def test_other_cards_are_named_when_none_fits(smi: Path) -> None:
    prints(smi, f"{H100}\n1, NVIDIA GB10, [N/A], [N/A], 580.95.05, GPU-1")
    with pytest.raises(IncompatibleError) as caught:
        find_gpu(89)
    assert "needs a GPU with sm_89, found NVIDIA H100 80GB HBM3 (sm_90), NVIDIA GB10 (sm_?)" in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("text", "returncode", "way_on"),
    [
        (NO_CONTACT, 9, "sudo modprobe nvidia"),
        ("Failed to initialize NVML: Driver/library version mismatch", 18, "reboot"),
        ('Field "compute_cap" is not a valid field to query.', 2, "install a newer one"),
        ("No devices were found", 6, "see dmesg"),
        ("No devices were found", 0, "see dmesg"),
        (f"{ADA}\nUnable to determine the device handle for GPU0: GPU is lost.", 15, "GPU is lost"),
        ("Segmentation fault", 139, "nvidia-smi exited 139 and said: Segmentation fault"),
    ],
)
def test_each_failure_of_the_driver_has_its_way_on(
    smi: Path, text: str, returncode: int, way_on: str
) -> None:
    prints(smi, text, returncode)
    with pytest.raises(IncompatibleError) as caught:
        probe_gpus()
    assert " ".join(text.split()) in str(caught.value)
    assert way_on in str(caught.value)


def test_machine_without_driver_has_no_gpu(smi: Path) -> None:
    with pytest.raises(IncompatibleError, match="no NVIDIA GPU here: nvidia-smi is missing"):
        find_gpu(89)


def test_driver_that_hangs_is_told(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi.write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    smi.chmod(0o755)
    monkeypatch.setattr(module, "_TIMEOUT_S", 0.3)
    with pytest.raises(IncompatibleError, match="the driver hangs"):
        probe_gpus()
