"""What runner tensorrt_rtx says in advance."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from pathlib import Path

import pytest
import yaml

from pipeline.core.data import data_dir
from pipeline.core.errors import IncompatibleError
from pipeline.core.gpu import conditions_of
from pipeline.core.values import Engine, Limits
from pipeline.formats.trtrtx.spec import PACKAGE
from pipeline.runners.tensorrt_rtx import TrtRtxRunner
from tests.acceptance.test_conditions import nvml

SETTINGS = yaml.safe_load((data_dir("conf") / "runner" / "tensorrt_rtx.yaml").read_text())
RUNNER = TrtRtxRunner(**{name: SETTINGS[name] for name in SETTINGS if name != "kind"})
ENGINE = Engine(
    dir=Path("/engine"),
    digest="0" * 64,
    format="trtrtx",
    variant="sm89-trtrtx-fp8-b4-s128",
    runtime=("tensorrt-rtx", "1.7.1.116"),
    sms=(89,),
    limits=Limits(max_batch_size=4, max_seq_len=128, max_num_tokens=256, kv_cache_dtype="bfloat16"),
    min_vram_bytes=0,
)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Versions that count as installed; a test changes them."""
    versions = {PACKAGE: "1.7.1.116", "torch": "2.13.0"}

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr("pipeline.runners.runner.version", version)
    return versions


def card(monkeypatch: pytest.MonkeyPatch, sm: tuple[int, int] | None) -> None:
    found = None if sm is None else conditions_of(nvml(DeviceGetCudaComputeCapability=sm), 0)
    monkeypatch.setattr("pipeline.runners.tensorrt_rtx.read_conditions", lambda: found)


def test_it_runs_where_all_is_there(
    installed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    card(monkeypatch, (8, 9))
    assert RUNNER.why_not(ENGINE) is None


@pytest.mark.parametrize(
    ("package", "found", "sm", "shown"),
    [
        (PACKAGE, "1.7.0.1", (8, 9), "which compiled the engine; got 1.7.0.1: pip install"),
        (PACKAGE, None, (8, 9), "got another: pip install tensorrt-rtx-cu13==1.7.1.116"),
        ("torch", "2.13.0+cpu", (8, 9), "PyTorch built for CUDA.*got 2.13.0.cpu"),
        ("torch", "2.13.0", None, "needs a CUDA device of SM 89, and NVML shows this process none"),
        ("torch", "2.13.0", (9, 0), "H100.* has SM 90: build with its target"),
    ],
)
def test_a_machine_that_does_not_fit_is_told(
    installed: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    package: str,
    found: str | None,
    sm: tuple[int, int] | None,
    shown: str,
) -> None:
    card(monkeypatch, sm)
    installed.pop(package)
    if found is not None:
        installed[package] = found
    reason = RUNNER.why_not(ENGINE) or ""
    assert re.search(shown, reason)
    assert reason.endswith("or take runner=onnxruntime, its graph on a CPU")


def test_a_package_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "needs the package tensorrt-rtx-cu13: pip install tensorrt-rtx-cu13==1.7.1.116" in str(
        RUNNER.why_not(ENGINE)
    )


def test_the_kernels_of_an_engine_are_kept_under_its_digest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ENGINESMITH_CACHE", str(tmp_path))
    wanted = str(tmp_path / "rtx-kernels" / ("ab" * 12))
    assert RUNNER.program(Path("/engine"), "ab" * 32).arguments["runtime_cache"] == wanted


def test_the_program_that_is_shipped_reports_why_it_cannot_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a card, and from another folder."""
    monkeypatch.setenv("ENGINESMITH_CACHE", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(IncompatibleError, match="sees no CUDA device"):  # noqa: SIM117
        with RUNNER.open_folder(tmp_path, "d" * 64):
            pass
