"""What a build is done with, told by the interpreter that has TensorRT-LLM."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.core.errors import IncompatibleError
from pipeline.formats.trtllm.compiler import PROBE, probe_environment
from pipeline.formats.trtllm.place import choose_place, find_card
from tests.formats.trtllm.fakes import card_machine, package_records
from tests.quant.tiny_quantized import ADA


def probed(folder: Path) -> dict[str, str | int]:
    place = choose_place("local", image="", card=lambda: find_card(ADA))
    return probe_environment(place, ADA, folder / "probe.log")


def test_versions_card_and_driver_are_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card_machine(tmp_path, monkeypatch)
    found = probed(tmp_path)
    assert (found["tensorrt_llm"], found["tensorrt"]) == ("1.2.1", "10.14.1.48")
    assert (found["card"], found["sm"], found["driver"]) == ("NVIDIA-Ada", 89, "590.44.01")
    assert found["image"] == ""


def test_other_release_is_refused_before_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card_machine(tmp_path, monkeypatch)
    other = tmp_path / "other"
    package_records(other, trtllm="1.3.0", tensorrt="10.15.1")
    monkeypatch.setenv("PYTHONPATH", str(other))
    with pytest.raises(IncompatibleError, match=r"needs TensorRT-LLM 1\.2\.1 .* TensorRT-LLM 1\.3"):
        probed(tmp_path)


def versions(folder: Path, *flags: str) -> dict[str, str]:
    """What the probe says under an interpreter that sees the packages of `folder`, and not ours."""
    out = folder / "versions.json"
    command = [sys.executable, *flags, "-S", "-c", PROBE, str(out)]
    subprocess.run(command, check=True, cwd=folder, env={"PYTHONPATH": str(folder)})
    found: dict[str, str] = json.loads(out.read_text())
    return found


def test_probe_needs_nothing_but_the_standard_library(tmp_path: Path) -> None:
    found = versions(tmp_path, "-I")
    assert found == {"tensorrt_llm": "", "tensorrt": "", "cuda": ""}


def test_cuda_is_that_of_the_installed_pytorch_which_is_not_imported(tmp_path: Path) -> None:
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')\n")
    (package / "version.py").write_text("__version__ = '2.9.1'\ncuda = '13.1'\n")
    assert versions(tmp_path)["cuda"] == "13.1"


def test_tensorrt_without_a_record_is_asked_itself(tmp_path: Path) -> None:
    package = tmp_path / "tensorrt"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '10.14.1'\n")
    assert versions(tmp_path)["tensorrt"] == "10.14.1"
