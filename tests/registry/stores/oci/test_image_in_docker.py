"""Other people's programs read the image: dockerd, skopeo, the stock model_signing command."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.registry.signing.keys import generate_key
from pipeline.registry.signing.model_signature import sign_engine
from tests.registry.stores.oci.conftest import Sealed
from tests.services.docker_registry import RunningRegistry
from tests.services.dockerd import running_dockerd

pytestmark = pytest.mark.services


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture
def signed(registry: RunningRegistry, sealed: Sealed, tmp_path: Path) -> Any:
    """A package with a real model signature in the registry; gives its tag and the public key."""
    key = generate_key()
    signature = sign_engine(sealed.package.manifest, key)
    statements = {f"model-{key.public.keyid[:12]}": {"model.sig": signature}}
    assert registry.store().put_package(sealed.package, statements, lambda count: None)
    pem = tmp_path / "key.pub"
    pem.write_bytes(key.public.pem)
    place = sealed.place
    tag = f"{registry.host}/engines/{place.name}:{place.variant}_{place.version}"
    return tag, pem, signature


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


def test_docker_pull_and_cp_give_the_same_bytes_and_the_stock_tool_verifies_them(
    signed: Any, sealed: Sealed, tmp_path: Path
) -> None:
    tag, pem, signature = signed
    out = tmp_path / "out"
    with running_dockerd() as host:
        docker = ("docker", "--host", host)
        run(*docker, "pull", tag)
        container = run(*docker, "create", tag, "-").strip()
        run(*docker, "cp", f"{container}:/models", str(out))
        run(*docker, "rm", container)
    expected = files_below(sealed.package.dir)
    assert files_below(out) == {**expected, "engine/model.sig": signature}
    assert {path.stat().st_mode & 0o777 for path in out.rglob("*") if path.is_file()} == {0o444}
    assert {path.stat().st_mode & 0o777 for path in out.rglob("*") if path.is_dir()} == {0o755}

    verify = [
        str(Path(sys.executable).with_name("model_signing")),
        *("verify", "key", str(out / "engine")),
        *("--public_key", str(pem), "--signature", str(out / "engine" / "model.sig")),
    ]
    run(*verify)
    plan = out / "engine" / "model.plan"
    plan.chmod(0o644)
    plan.write_bytes(plan.read_bytes()[:-1] + b"!")
    assert subprocess.run(verify, capture_output=True, check=False).returncode != 0


def test_skopeo_reads_and_copies_the_image(signed: Any, sealed: Sealed, tmp_path: Path) -> None:
    if shutil.which("skopeo") is None:
        pytest.fail("skopeo is not installed: apt-get install -y --no-install-recommends skopeo")
    tag, _, signature = signed
    shown = json.loads(run("skopeo", "inspect", "--tls-verify=false", f"docker://{tag}"))
    assert (shown["Os"], shown["Architecture"]) == ("linux", "amd64")
    assert len(shown["Layers"]) == 4  # small files, two large ones, model.sig
    folder = tmp_path / "layout"
    run(
        *("skopeo", "copy", "--insecure-policy", "--src-tls-verify=false"),
        *("--preserve-digests", f"docker://{tag}", f"dir:{folder}"),
    )
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    for layer in shown["Layers"]:  # uncompressed: plain tar reads each of them
        blob = folder / layer.removeprefix("sha256:")
        run("tar", "--extract", "--file", str(blob), "--directory", str(unpacked))
    expected = {**files_below(sealed.package.dir), "engine/model.sig": signature}
    assert files_below(unpacked / "models") == expected
