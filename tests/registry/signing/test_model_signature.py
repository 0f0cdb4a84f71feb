"""The model signature, and the stock `model_signing` command on it."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import UntrustedError
from pipeline.registry.signing.keys import generate_key, write_key_pair
from pipeline.registry.signing.model_signature import (
    available,
    check_engine_signature,
    sign_engine,
)

Bench = Any
KEY = generate_key()

pytestmark = pytest.mark.skipif(not available(), reason="the extra `sign` is not installed")


@pytest.fixture
def manifest(bench: Bench, tmp_path: Path) -> dict[str, Any]:
    """Of a package in tmp_path/package, with a file that git tools like to hide."""
    engine = bench.engine()
    (engine.dir / ".github").mkdir()
    (engine.dir / ".github" / "hidden.bin").write_bytes(b"native code")
    (engine.dir / ".gitattributes").write_text("*.plan binary\n")
    (tmp_path / "package").mkdir()
    made: dict[str, Any] = bench.seal(tmp_path / "package", engine).manifest
    return made


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
    manifest: dict[str, Any], tmp_path: Path
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


def test_signature_holds_for_exactly_these_files(manifest: dict[str, Any]) -> None:
    data = sign_engine(manifest, KEY)
    check_engine_signature(data, manifest, KEY.public, "model.sig")
    first, *rest = manifest["files"]
    hidden = next(file for file in manifest["files"] if ".github" in file["path"])
    for files in (
        rest,
        [*manifest["files"], {**first, "path": "engine/extra"}],
        [*manifest["files"], {**first, "path": "engine/.git/extra"}],
        [{**first, "sha256": "0" * 64}, *rest],
        [{**first, "sha256": rest[0]["sha256"]}, {**rest[0], "sha256": first["sha256"]}, *rest[1:]],
        [file for file in manifest["files"] if file is not hidden],
    ):
        with pytest.raises(UntrustedError, match="Signature mismatch"):
            check_engine_signature(data, {"files": files}, KEY.public, "model.sig")


def test_signature_of_another_key_is_refused(manifest: dict[str, Any]) -> None:
    stranger = generate_key()
    data = sign_engine(manifest, stranger)
    with pytest.raises(UntrustedError, match="Key mismatch"):
        check_engine_signature(data, manifest, KEY.public, "model.sig")
    forged = json.loads(data)
    ours = json.loads(sign_engine(manifest, KEY))["verificationMaterial"]
    forged["verificationMaterial"] = ours
    with pytest.raises(UntrustedError, match="another key"):
        check_engine_signature(json.dumps(forged).encode(), manifest, KEY.public, "model.sig")


def test_damaged_signature_is_refused_without_a_traceback(manifest: dict[str, Any]) -> None:
    data = sign_engine(manifest, KEY)
    bundle = json.loads(data)
    del bundle["dsseEnvelope"]["signatures"]
    statement = json.loads(base64.b64decode(json.loads(data)["dsseEnvelope"]["payload"]))
    assert statement["predicate"]["serialization"]["method"] == "files"
    for broken in (b"", data[: len(data) // 2], b"{}", b"[]", b"\xff", json.dumps(bundle).encode()):
        with pytest.raises(UntrustedError, match="damaged"):
            check_engine_signature(broken, manifest, KEY.public, "model.sig")


def test_nothing_is_printed_for_a_bundle_of_an_old_kind(
    manifest: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = json.loads(sign_engine(manifest, KEY))
    bundle["verificationMaterial"]["publicKey"].pop("hint")
    check_engine_signature(json.dumps(bundle).encode(), manifest, KEY.public, "model.sig")
    assert capsys.readouterr().out == ""


def test_private_key_is_on_no_disk_while_signing(
    manifest: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
