"""Stand-ins for base images, since no registry can be reached: Debian with Python, made here.

The one for TensorRT-LLM's release image has packages in name only. Like the real one it has a
patched Python with `dist-packages`, pip, make and no venv package. The packages that need a GPU or
gigabytes are metadata: pip sees the image's versions and must leave them. What the light core
imports is real, PyYAML in Debian's older version included.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from image.install import lacking, pinned

if TYPE_CHECKING:
    from docker import DockerClient

DEBIAN = "stand-in/debian:bookworm"


BASE = "stand-in/release:1.2.1"


INSTALL = "apt-get install -y --no-install-recommends debootstrap"


SUITE = "bookworm"
"""Debian 12, for its Python 3.11: the version that requirements-image.lock is for."""


NAMES_ONLY = {
    "accelerate": "1.12.0",
    "huggingface-hub": "0.36.0",
    "ml-dtypes": "0.5.4",
    "networkx": "3.6.1",
    "ninja": "1.13.0",
    "numpy": "1.26.4",
    "nvidia-ml-py": "13.590.44",
    "nvidia-modelopt": "0.37.0",
    "onnx": "1.19.1",
    "protobuf": "6.33.2",
    "psutil": "7.2.1",
    "pulp": "3.3.0",
    "regex": "2025.11.3",
    "safetensors": "0.7.0",
    "scipy": "1.16.3",
    "sympy": "1.14.0",
    "tensorrt-llm": "1.2.1",
    "tokenizers": "0.22.1",
    "torch": "2.10.0a0+b4e4ee81d3.nv25.12",
    "torchprofile": "0.0.4",
    "tqdm": "4.67.1",
    "transformers": "4.57.3",
}
"""torch, transformers, nvidia-modelopt, tensorrt-llm: the image's; others: at most our lock's."""


def make_debian(client: DockerClient, folder: Path) -> str:
    """Put Debian with Python and pip into an engine; its name."""
    if shutil.which("debootstrap") is None:
        pytest.fail(f"debootstrap not installed: {INSTALL}")
    root = folder / "root"
    packages = "python3-minimal,python3-pip,python3-yaml,make"
    made = subprocess.run(
        ["debootstrap", "--variant=minbase", f"--include={packages}", SUITE, str(root)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stdout[-3000:] + made.stderr[-3000:]
    archive = folder / "root.tar"
    subprocess.run(
        ["tar", "--directory", str(root), "--create", "--file", archive, "."], check=True
    )
    shutil.rmtree(root)
    repository, _, tag = DEBIAN.partition(":")
    client.api.import_image_from_file(str(archive), repository=repository, tag=tag)
    archive.unlink()
    return DEBIAN


def make_release(client: DockerClient, debian: str, folder: Path) -> str:
    """Put the stand-in for the release image into an engine that has Debian; its name."""
    context = folder / "release"
    for name, version in NAMES_ONLY.items():
        wheel = write_wheel(folder / "names", name, version)
        shutil.unpack_archive(wheel, context / "site", "zip")
    (context / "Dockerfile").write_text(
        f"FROM {debian}\nCOPY site /usr/local/lib/python3.11/dist-packages\n"
    )
    client.images.build(path=str(context), tag=BASE, rm=True)
    return BASE


def download_wheels(lock: Path, folder: Path) -> None:
    """Wheels for Dockerfile.build without network: what the base lacks, and setuptools."""
    assert sys.version_info[:2] == (3, 11), "wheels for the stand-in are made with its own Python"
    pins = pinned(lock.read_text())
    base = {**NAMES_ONLY, "pyyaml": "6.0"}
    wanted = {**lacking(pins, base), "setuptools": pins["setuptools"]}
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder)]
        + [f"{name}=={version}" for name, version in wanted.items()],
        check=True,
    )


def download_client_wheels(project: Path, lock: Path, folder: Path) -> None:
    """Wheels for Dockerfile.client without network: the light install, and what builds it."""
    assert sys.version_info[:2] == (3, 11), "wheels for the stand-in are made with its own Python"
    asked = tomllib.loads(project.read_text())
    wanted = [*asked["project"]["dependencies"], *asked["build-system"]["requires"], "nvidia-ml-py"]
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet"]
    subprocess.run(
        [*pip, "--wheel-dir", str(folder), "--constraint", str(lock), *wanted], check=True
    )


def write_wheel(folder: Path, name: str, version: str, requires: Sequence[str] = ()) -> Path:
    """An importable, empty package of that name: nothing but metadata, with `Requires-Dist`."""
    folder.mkdir(parents=True, exist_ok=True)
    module = name.replace("-", "_")
    stem = f"{module}-{version}"
    info = f"{stem}.dist-info"
    metadata = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    metadata += [f"Requires-Dist: {line}" for line in requires]
    files = {
        f"{module}/__init__.py": "",
        f"{info}/METADATA": "\n".join(metadata) + "\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in (*files, f"{info}/RECORD"))
    wheel = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(path, text)
    return wheel


def copy_checkout(folder: Path, *names: str) -> None:
    """The files of a checkout that builds of both images read, and `names`."""
    folder.mkdir()
    for name in (
        *(".dockerignore", "LICENSE", "Makefile", "README.md", "conf", "pipeline"),
        *("pyproject.toml", "recipes", *names),
    ):
        source = Path(name)
        if source.is_dir():
            skip = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, folder / name, ignore=skip)
        else:
            shutil.copyfile(source, folder / name)
