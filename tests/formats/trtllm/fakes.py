"""A fake `trtllm-build`, a fake card, TensorRT-LLM's package records, and settings for them."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.formats.trtllm.build_tool import Plugins
from pipeline.formats.trtllm.compiler import TrtLlmCompiler
from tests.nvml import Card, nvml

HERE = Path(__file__).parent


GPU_UUID = "GPU-3f2504e0-4f89-11d3-9a0c-0305e82c3301"


def write_script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def fake_card(
    monkeypatch: pytest.MonkeyPatch,
    *,
    name: str = "NVIDIA Ada",
    sm: tuple[int, int] = (8, 9),
    driver: str = "590.44.01",
) -> None:
    """This machine has one card."""
    card = Card(name=name, sm=sm, uuid=GPU_UUID)
    monkeypatch.setitem(sys.modules, "pynvml", nvml(card, driver=driver))


def fake_build_program(folder: Path, python: str = sys.executable) -> None:
    """`trtllm-build` with its list of options beside it."""
    source = (HERE / "fake_trtllm_build.py").read_text()
    write_script(folder / "trtllm-build", f"#!{python}\n{source}")
    shutil.copyfile(HERE / "trtllm_build_options.json", folder / "trtllm_build_options.json")


def package_records(folder: Path, *, trtllm: str = "1.2.1", tensorrt: str = "10.14.1.48") -> None:
    """What pip would have written about the two packages."""
    for name, version in (("tensorrt_llm", trtllm), ("tensorrt", tensorrt)):
        record = folder / f"{name}-{version}.dist-info" / "METADATA"
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def card_machine(folder: Path, monkeypatch: pytest.MonkeyPatch, **card: Any) -> Path:
    """This machine with the target's card, TensorRT-LLM 1.2.1 and the fake program on its PATH."""
    programs, packages = folder / "bin", folder / "packages"
    fake_card(monkeypatch, **card)
    fake_build_program(programs)
    package_records(packages)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(packages))
    return programs


def bare_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with an empty PATH: no card, no Docker program, no trtllm-build."""
    programs = folder / "bin"
    programs.mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv("PATH", str(programs))
    fault = "NVML Shared Library Not Found"
    monkeypatch.setitem(sys.modules, "pynvml", nvml(fault=fault))
    return programs


ADA_PLUGINS = Plugins(
    gemm_plugin="disable",
    use_fused_mlp=True,
    use_paged_context_fmha=True,
    multiple_profiles=True,
    tokens_per_block=32,
)


FIELDS: dict[str, Any] = {
    "max_batch_size": 4,
    "max_seq_len": 128,
    "max_num_tokens": 256,
    "opt_num_tokens": None,
    "kv_cache_dtype": "fp8",
    "dtype": "bfloat16",
    "where": "auto",
    "image": "enginesmith-build:1.2.1",
    "timeout_s": 60.0,
    "memory_gib": None,
    "plugins": ADA_PLUGINS,
}


def compiler(plugins: dict[str, Any] | None = None, **fields: Any) -> TrtLlmCompiler:
    """A compiler whose settings differ in some fields or kernel choices."""
    changed = replace(ADA_PLUGINS, **plugins) if plugins else ADA_PLUGINS
    return TrtLlmCompiler(**{**FIELDS, "plugins": changed, **fields})
