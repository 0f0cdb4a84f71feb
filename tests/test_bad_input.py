"""Bad input: quick, one clear message with the next step, the right exit code, nothing left."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.core.data import data_dir
from tests.tiny_recipe import Workplace

LIMIT_S = 5.0
RECIPE = (data_dir("recipes") / "phi3.yaml").read_text()
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}


Refuse = Callable[[list[str], int, str], None]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, the current one, with a cache and keys of its own beside it."""
    monkeypatch.setenv("ENGINESMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ENGINESMITH_CONFIG", str(tmp_path / "config"))
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def refuse(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refuse:
    """A command that must fail at once, say what is wrong in one paragraph, and leave nothing."""

    def refuse(arguments: list[str], code: int, message: str) -> None:
        before = sorted(here.rglob("*"))
        monkeypatch.setattr(sys, "argv", ["enginesmith", *arguments])
        assert main() == code, capsys.readouterr().err
        shown = capsys.readouterr()
        errors = shown.err + shown.out
        assert message in errors
        assert "Traceback" not in errors
        assert "\n\n" not in shown.err.strip(), "one paragraph"
        assert sorted(here.rglob("*")) == before

    return refuse


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A small tmpfs; the test is skipped where this process may not mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_artifacts_on_a_read_only_disk(place: Workplace) -> None:
    with mounted(place.artifacts, "ro,size=1m"):
        assert "artifacts" in refused(place, 1)


def test_cache_disk_too_small_for_the_build(place: Workplace) -> None:
    with mounted(place.cache, "size=64k"):
        message = refused(place, 9)
        assert "disk full" in message
        assert "ENGINESMITH_CACHE" in message
