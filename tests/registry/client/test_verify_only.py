"""Folders that somebody else filled: copied, mounted read-only, taken out of an image."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.core.errors import CorruptError, IncompatibleError, UntrustedError
from pipeline.registry.client.verify_only import verify_only
from pipeline.registry.signing.keys import generate_key
from tests.registry.client.conftest import Shop


@pytest.fixture
def filled(shop: Shop) -> Path:
    """A pulled folder."""
    shop.publish()
    shop.pull()
    return shop.to


def test_a_pulled_folder_verifies_without_its_registry(shop: Shop, filled: Path) -> None:
    shutil.rmtree(shop.store.url)
    done = verify_only(filled, shop.request(registry=""))
    assert (done.came, done.proven, done.fetched_bytes) == ("verified", "proven", 0)


def test_a_copy_verifies_too(shop: Shop, filled: Path) -> None:
    subprocess.run(["cp", "-a", str(filled), str(shop.home / "copy")], check=True)
    assert verify_only(shop.home / "copy", shop.request(registry="")).proven == "proven"


def test_a_folder_without_statements_takes_them_from_the_registry(shop: Shop, filled: Path) -> None:
    """As a mounted image has it: manifest, engine, model.sig."""
    shutil.rmtree(filled / "statements")
    (filled / "pull.json").unlink()
    with pytest.raises(UntrustedError, match="not signed"):
        verify_only(filled, shop.request(registry=""))
    done = verify_only(filled, shop.request(registry=shop.store.url))
    assert (done.proven, done.registry) == ("proven", shop.store.url)


@pytest.mark.parametrize(
    "path", ["engine/more", "statements/a/b/c", "more", "engine/sub/model.sig"]
)
def test_nothing_else_may_lie_there(shop: Shop, filled: Path, path: str) -> None:
    (filled / path).parent.mkdir(parents=True, exist_ok=True)
    (filled / path).write_text("nobody listed me")
    with pytest.raises(CorruptError):
        verify_only(filled, shop.request(registry=""))


def test_a_link_in_place_of_the_signature_is_refused(shop: Shop, filled: Path) -> None:
    (filled / "engine" / "model.sig").unlink(missing_ok=True)
    (filled / "engine" / "model.sig").symlink_to("/etc/hostname")
    with pytest.raises(CorruptError, match="symbolic link"):
        verify_only(filled, shop.request(registry=""))


def test_a_model_signature_by_somebody_else_is_untrusted(shop: Shop, filled: Path) -> None:
    pytest.importorskip("model_signing")
    from pipeline.registry.manifest import MANIFEST, read_manifest
    from pipeline.registry.signing.model_signature import sign_engine

    path = filled / "engine" / "model.sig"
    path.unlink()
    path.write_bytes(sign_engine(read_manifest(filled / MANIFEST)[0], generate_key()))
    with pytest.raises(UntrustedError, match="may sign builds"):
        verify_only(filled, shop.request(registry=""))


def test_compatibility_and_proof_count_here_too(shop: Shop, filled: Path) -> None:
    with pytest.raises(IncompatibleError, match="SM 90"):
        verify_only(filled, shop.request(registry="", flags={"gpu": "h100"}))
    with pytest.raises(IncompatibleError, match="NVIDIA-L4"):
        verify_only(filled, shop.request(registry="", flags={"gpu": "l4"}))
    accepted = shop.request(registry="", flags={"gpu": "l4"}, accept_unproven=True)
    assert verify_only(filled, accepted).proven == "unproven"


def test_the_stock_tool_verifies_the_engine_folder(shop: Shop, filled: Path) -> None:
    pytest.importorskip("model_signing")
    public = shop.home / "release.pub"
    public.write_bytes(shop.key.public.pem)
    engine = filled / "engine"
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(engine)]
    command += ["--public_key", str(public), "--signature", str(engine / "model.sig")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    plan = engine / "model.plan"
    plan.chmod(0o644)
    plan.write_bytes(plan.read_bytes() + b"x")
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0


@pytest.fixture
def read_only(filled: Path) -> Iterator[Path]:
    """The folder on a file system that cannot be written."""
    target = filled.parent / "mounted"
    target.mkdir()
    bind = ["mount", "--bind", str(filled), str(target)]
    if os.getuid() or subprocess.run(bind, check=False, capture_output=True).returncode:
        pytest.skip("mounting needs root")
    subprocess.run(["mount", "-o", "remount,bind,ro", str(target)], check=True)
    try:
        yield target
    finally:
        subprocess.run(["umount", str(target)], check=True)


def test_a_read_only_mount_is_verified_and_not_written_to(shop: Shop, read_only: Path) -> None:
    with pytest.raises(OSError, match="Read-only"):
        (read_only / "probe").touch()
    assert verify_only(read_only, shop.request(registry="")).proven == "proven"
