"""The model signature, and the stock `model_signing` command on it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.registry.trust.keys import generate_key, write_key_pair
from pipeline.registry.trust.signing import can_sign_models, sign_engine
from tests.registry.packages import sealed_package

KEY = generate_key()

pytestmark = pytest.mark.skipif(not can_sign_models(), reason="the extra `sign` is not installed")


@pytest.fixture
def manifest(tmp_path: Path) -> Mapping[str, Any]:
    """Of a package in tmp_path/package, with a file that git tools like to hide."""
    files = {
        "model.plan": b"plan",
        ".github/hidden.bin": b"native code",
        ".gitattributes": b"*.plan binary\n",
    }
    return sealed_package(tmp_path / "package", files).manifest


def _stock(folder: Path, public: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """What somebody without our program does; no network may be needed."""
    signature = folder / "engine" / "model.sig"
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(folder / "engine")]
    return subprocess.run(
        [*command, "--public_key", str(public), "--signature", str(signature), *more],
        env={**os.environ, "HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_stock_tool_verifies_the_engine_folder_and_refuses_a_changed_one(
    manifest: Mapping[str, Any], tmp_path: Path
) -> None:
    public = write_key_pair(KEY, tmp_path / "ci.key")
    (tmp_path / "package" / "engine" / "model.sig").write_bytes(sign_engine(manifest, KEY))
    mounted = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "package", mounted)
    done = _stock(mounted, public, "--no-ignore-git-paths")
    assert (done.returncode, "succeeded" in done.stdout) == (0, True), done.stdout + done.stderr
    stranger = write_key_pair(generate_key(), tmp_path / "other.key")
    assert _stock(mounted, stranger, "--no-ignore-git-paths").returncode == 1
    (mounted / "engine" / ".github" / "hidden.bin").write_bytes(b"native c0de")
    assert _stock(mounted, public, "--no-ignore-git-paths").returncode == 1


def test_private_key_is_on_no_disk_while_signing(
    manifest: Mapping[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def kept() -> Iterator[str]:
        yield str(tmp_path / "kept")

    (tmp_path / "kept").mkdir()
    monkeypatch.setattr("tempfile.TemporaryDirectory", kept)
    sign_engine(manifest, KEY)
    (found,) = (tmp_path / "kept").iterdir()
    assert found.name == "model.sig"
    assert b"PRIVATE" not in found.read_bytes()
