"""Other people's programs read the image: dockerd and skopeo."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline.core.published import Package
from tests.registry.packages import place_of, sealed_package
from tests.services.docker_registry import RunningRegistry
from tests.services.dockerd import running_dockerd

pytestmark = pytest.mark.services


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture
def package(tmp_path: Path) -> Package:
    files = {"model.plan": bytes(range(256)) * (40 << 10), "tokenizer/naïve.json": b"[]"}
    return sealed_package(tmp_path / "package", files)


@pytest.fixture
def tag(docker_registry: RunningRegistry, package: Package) -> str:
    """Where a published image lies."""
    docker_registry.store().put_package(package, [], lambda _: None)
    place = place_of(package)
    return f"{docker_registry.host}/engines/{place.name}:{place.variant}_{place.version}"


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


def test_docker_pull_and_cp_give_the_same_bytes(tag: str, package: Package, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with running_dockerd() as host:
        docker = ("docker", "--host", host)
        run(*docker, "pull", tag)
        container = run(*docker, "create", tag, "-").strip()
        run(*docker, "cp", f"{container}:/models", str(out))
        run(*docker, "rm", container)
    assert files_below(out) == files_below(package.dir)
    assert {path.stat().st_mode & 0o777 for path in out.rglob("*") if path.is_file()} == {0o444}
    assert {path.stat().st_mode & 0o777 for path in out.rglob("*") if path.is_dir()} == {0o755}


def test_skopeo_reads_and_copies_the_image(tag: str, package: Package, tmp_path: Path) -> None:
    if shutil.which("skopeo") is None:
        pytest.fail("skopeo is not installed: apt-get install -y --no-install-recommends skopeo")
    shown = json.loads(run("skopeo", "inspect", "--tls-verify=false", f"docker://{tag}"))
    assert (shown["Os"], shown["Architecture"]) == ("linux", "amd64")
    assert len(shown["Layers"]) == 2  # small files, a large one
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
    assert files_below(unpacked / "models") == files_below(package.dir)
