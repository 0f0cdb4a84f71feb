"""Where TensorRT-LLM runs, and why it cannot: with real programs on a PATH of the test's own."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipeline.core.errors import IncompatibleError
from pipeline.core.gpu import Gpu
from pipeline.formats.trtllm.compiler import PROBE, probe_environment
from pipeline.formats.trtllm.place import (
    ToolHost,
    Where,
    choose_place,
    find_card,
    is_stale,
    owner_of,
    preflight,
    require_driver,
    require_gpu_runtime,
)
from tests.formats.trtllm.fakes import (
    GPU_UUID,
    bare_machine,
    card_machine,
    compiler,
    package_records,
    write_script,
)
from tests.formats.trtllm.python_image import IMAGE
from tests.nvml import Card, nvml
from tests.quant.tiny_quantized import ADA

if TYPE_CHECKING:
    from docker import DockerClient


def choose(where: Where = "auto") -> ToolHost:
    return choose_place(where, image=IMAGE, card=lambda: find_card(ADA))


@pytest.mark.parametrize("where", ["auto", "local"])
def test_program_on_the_path_is_taken(
    where: Where, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = card_machine(tmp_path, monkeypatch)
    place = choose(where)
    assert place.program == programs / "trtllm-build"
    assert place.gpu is not None
    assert place.gpu.uuid == GPU_UUID
    assert place.python == sys.executable


def test_local_without_the_program_names_the_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare_machine(tmp_path, monkeypatch)
    with pytest.raises(IncompatibleError, match=r"install tensorrt-llm 1\.2\.1 .*where=docker"):
        choose("local")


def test_other_card_of_the_same_sm_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card_machine(tmp_path, monkeypatch, name="NVIDIA L40S")
    with pytest.raises(IncompatibleError, match=r"is NVIDIA-Ada, this machine has NVIDIA-L40S"):
        choose()


def test_own_card_is_found_among_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card_machine(tmp_path, monkeypatch)
    cards = (Card(name="NVIDIA L40S", uuid="GPU-other"), Card(name="NVIDIA Ada", uuid=GPU_UUID))
    monkeypatch.setitem(sys.modules, "pynvml", nvml(*cards))
    assert find_card(ADA).uuid == GPU_UUID


def test_program_runs_on_the_card_offline_with_a_home_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card_machine(tmp_path, monkeypatch)
    monkeypatch.setenv("HOME", "/proc/none")
    place = choose()
    script = write_script(tmp_path / "seen", '#!/bin/sh\necho home > "$HOME/file"\nenv\n')
    log = tmp_path / "run.log"
    place.run([str(script)], [], stage="seen", log_path=log, timeout_s=30.0)
    seen = dict(line.split("=", 1) for line in log.read_text().splitlines() if "=" in line)
    assert seen["CUDA_VISIBLE_DEVICES"] == GPU_UUID
    assert seen["HF_HUB_OFFLINE"] == "1"
    assert seen["TRANSFORMERS_OFFLINE"] == "1"
    assert seen["HOME"] != "/proc/none"
    assert not Path(seen["HOME"]).exists()


def test_bare_machine_learns_three_ways_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare_machine(tmp_path, monkeypatch)
    with pytest.raises(IncompatibleError) as caught:
        compiler().check_machine(ADA)
    message = str(caught.value)
    for part in (
        "trtllm-build is not on the PATH",
        "no NVIDIA GPU here",
        "compiler=trtrtx ",
        "compiler=checkpoint ",
        "make image",
    ):
        assert part in message
    assert caught.value.exit_code == 6


def probed(folder: Path) -> dict[str, str | int]:
    place = choose_place("local", image="", card=lambda: find_card(ADA))
    return probe_environment(place, ADA, folder / "probe.log")


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


CARD = Gpu(
    name="NVIDIA GeForce RTX 4090",
    sm=89,
    driver="580.65.06",
    uuid="GPU-1",
)


@pytest.mark.parametrize("driver", ["579.99", "535.1", "[N/A]"])
def test_driver_too_old_for_the_image_is_refused(driver: str) -> None:
    require_driver(CARD)
    with pytest.raises(IncompatibleError) as caught:
        require_driver(dataclasses.replace(CARD, driver=driver))
    assert f"RTX 4090: driver {driver} is too old for CUDA 13.1, which needs 580" in str(
        caught.value
    )


def cdi(device: str) -> dict[str, object]:
    return {"Runtimes": {"runc": {}}, "DiscoveredDevices": [{"Source": "cdi", "ID": device}]}


@pytest.mark.parametrize(
    "info", [{"Runtimes": {"runc": {}, "nvidia": {}}}, cdi("nvidia.com/gpu=0")]
)
def test_gpu_runtime_is_the_runtime_or_a_cdi_device(
    info: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    require_gpu_runtime(info)


@pytest.mark.parametrize("info", [{}, cdi("amd.com/gpu=0")])
def test_no_gpu_runtime_is_refused(
    info: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(IncompatibleError, match="install the NVIDIA Container Toolkit"):
        require_gpu_runtime(info)


@pytest.mark.services
@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("tcp://127.0.0.1:2375", "remote engine does not see this machine's folders"),
        ("unix:///nowhere/docker.sock", "no Docker engine here: install one"),
    ],
)
def test_engine_that_is_remote_or_missing_is_refused(
    host: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", host)
    with pytest.raises(IncompatibleError, match=message):
        preflight(IMAGE, CARD)


@pytest.mark.services
@pytest.mark.usefixtures("hook")
def test_image_that_was_built_here_is_known_by_its_id(client: DockerClient) -> None:
    assert preflight(IMAGE, CARD) == client.images.get(IMAGE).id
    with pytest.raises(IncompatibleError, match="get it: make image"):
        preflight("no:1", CARD)


def test_container_of_an_ended_process_is_stale() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = owner_of(process.pid)
    assert not is_stale(owner)
    process.communicate(b"\n")
    assert is_stale(owner)


def test_process_with_a_used_id_or_of_another_namespace_is_told_apart() -> None:
    namespace, pid, start = owner_of(os.getpid()).split()
    assert is_stale(f"{namespace} {pid} {int(start) - 1}")
    assert not is_stale(f"pid:[1] {2**22 + 1} 1")
