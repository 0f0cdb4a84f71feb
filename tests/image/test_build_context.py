"""What `docker build` sends to the engine, and what make and the lock say; no engine needed."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from image.install import pinned


@pytest.fixture
def sent(tmp_path: Path) -> set[str]:
    """Paths that the ignore file lets through, of a checkout with much else in it."""
    from docker.utils.build import exclude_paths

    for name in (
        "LICENSE", "Makefile", "README.md", "pyproject.toml", "requirements-image.lock",
        "image/install.py", "conf/build.yaml", "pipeline/cli.py",
        "recipes/smollm2.yaml",
        "pipeline/__pycache__/cli.pyc", "wheels/a-1-py3-none-any.whl", ".git/config", ".env",
        ".venv/bin/python", "artifacts/phi3/engine/rank0.engine", "model.safetensors",
        "tests/tiny.py", "token.txt",
    ):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    lines = Path(".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    sent = exclude_paths(str(tmp_path), patterns)
    return {name for name in sent if (tmp_path / name).is_file()}


def test_engine_gets_what_the_dockerfile_copies_and_nothing_else(sent: set[str]) -> None:
    assert sent == {
        "LICENSE", "Makefile", "README.md", "pyproject.toml", "requirements-image.lock",
        "image/install.py", "conf/build.yaml", "pipeline/cli.py",
        "recipes/smollm2.yaml",
        "wheels/a-1-py3-none-any.whl",
    }  # fmt: skip


def test_base_is_pinned_by_digest_and_is_the_release_of_the_extra() -> None:
    dockerfile = Path("Dockerfile.build").read_text()
    (base,) = re.findall(r"^ARG BASE=(\S+)$", dockerfile, re.MULTILINE)
    name, _, digest = base.partition("@sha256:")
    assert re.fullmatch(r"[0-9a-f]{64}", digest)
    release = name.rpartition(":")[2]
    assert f'trtllm = ["tensorrt-llm=={release}"]' in Path("pyproject.toml").read_text()


def test_lock_has_the_images_pins_and_names_no_place() -> None:
    lock = Path("requirements-image.lock").read_text()
    pins = pinned(lock)
    assert pins["nvidia-modelopt"] == "0.37.0"
    assert pins["transformers"] == "4.57.3"
    assert pins["numpy"].startswith("1.26.")
    assert pins["onnx"].startswith("1.19.")
    assert "://" not in lock
    assert "+" not in "".join(pins.values()), "a local version can be had in one place only"


def make(*arguments: str) -> str:
    """The commands that make would run."""
    done = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.mark.parametrize("target", ["engine", "plan", "test-image-pins", "test-gpu"])
def test_given_interpreter_is_used_and_nothing_is_installed(target: str) -> None:
    commands = make(target, "MODEL=phi3", "PYTHON=python3")
    assert "python3 -m p" in commands
    assert "venv" not in commands
    assert "pip" not in commands.replace("pipeline", "")
