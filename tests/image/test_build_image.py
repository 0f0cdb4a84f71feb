"""Dockerfile.build, on a real engine and without network, on a stand-in for NVIDIA's image.

Not shown here: that the real image's packages agree with ours. There the build itself stops if they
do not.
"""

from __future__ import annotations

import json
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from image.install import changed
from tests.image.base import BASE, NAMES_ONLY, copy_checkout, download_wheels, make_release

if TYPE_CHECKING:
    from docker import DockerClient

pytestmark = pytest.mark.services

NAME = "enginesmith-build:test"
OURS = ("opt/enginesmith", "enginesmith", "home/enginesmith")
BY_THE_ENGINE = (".dockerenv", "dev/", "etc/hostname", "etc/hosts", "etc/mtab", "etc/resolv.conf")
"""Made anew for each container."""
FOREIGN_UID = "4321:4321"
"""A user that no /etc/passwd knows, as `docker run --user` may name."""


@pytest.fixture(scope="module")
def work() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="build-image-"))
    folder.chmod(0o755)  # a mount of it is entered by other users than root
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def context(work: Path) -> Path:
    """A checkout's files and the wheels, for a build without network."""
    folder = work / "context"
    copy_checkout(folder, "Dockerfile.build", "image", "requirements-image.lock")
    download_wheels(Path("requirements-image.lock"), folder / "wheels")
    return folder


@pytest.fixture(scope="module")
def base(client: DockerClient, debian: str, work: Path) -> str:
    return make_release(client, debian, work)


@dataclass(frozen=True)
class Built:
    """The image and what building it printed."""

    image: Any
    log: str


def build(client: DockerClient, context: Path, base: str, tag: str) -> Built:
    """What `make image` does; the engine has no network."""
    image, log = client.images.build(
        path=str(context),
        dockerfile="Dockerfile.build",
        tag=tag,
        buildargs={"BASE": base, "PIP_NO_INDEX": "1", "REVISION": "abc123"},
        network_mode="none",
        rm=True,
    )
    return Built(image, "".join(entry.get("stream", "") for entry in log))


@pytest.fixture(scope="module")
def built(client: DockerClient, context: Path, base: str) -> Built:
    return build(client, context, base, NAME)


@dataclass(frozen=True)
class Run:
    """A finished container."""

    code: int
    output: str


def run(client: DockerClient, image: str, *command: str, **options: Any) -> Run:
    """A command in a container without network."""
    container = client.containers.create(image, list(command), network_mode="none", **options)
    try:
        container.start()
        code = container.wait(timeout=120)["StatusCode"]
        return Run(code, container.logs().decode())
    finally:
        container.remove(force=True)


def packages(client: DockerClient, image: str, python: str) -> dict[str, str]:
    listed = run(client, image, python, "-m", "pip", "list", "--format=json", entrypoint=[])
    assert listed.code == 0, listed.output
    parsed = json.loads(listed.output[listed.output.index("[") :].splitlines()[0])
    return {entry["name"].lower().replace("_", "-"): entry["version"] for entry in parsed}


def test_packages_of_the_base_keep_their_versions(client: DockerClient, built: Built) -> None:
    before = packages(client, BASE, "/usr/bin/python3")
    assert before.items() >= NAMES_ONLY.items()
    assert packages(client, NAME, "/usr/bin/python3") == before
    after = packages(client, NAME, "python3")
    assert changed(before, after) == []
    assert {"enginesmith", "hydra-core", "pydantic", "onnxruntime"} <= after.keys() - before.keys()
    assert "hydra-core==1.3" in built.log


def files(client: DockerClient, image: str) -> dict[str, tuple[int, int, int, str]]:
    """Every path of an image outside our folders: size, mode, time and link target."""
    container = client.containers.create(image, ["true"])
    try:
        with tempfile.TemporaryFile() as stream:
            for chunk in container.export():
                stream.write(chunk)
            stream.seek(0)
            with tarfile.open(fileobj=stream) as tar:
                return {
                    entry.name: (entry.size, entry.mode, int(entry.mtime), entry.linkname)
                    for entry in tar
                    if not entry.isdir() and not entry.name.startswith((*OURS, *BY_THE_ENGINE))
                }
    finally:
        container.remove(force=True)


def test_no_file_of_the_base_is_changed_and_none_is_added(
    client: DockerClient, built: Built
) -> None:
    before = files(client, BASE)
    assert len(before) > 1000
    assert files(client, NAME) == before


def test_image_says_what_it_is_and_is_not_root(built: Built) -> None:
    config = built.image.attrs["Config"]
    assert config["User"] == "1000:1000"
    assert not config["Entrypoint"]
    assert config["Cmd"] == ["make", "help"]
    labels = config["Labels"]
    assert labels["org.opencontainers.image.base.name"] == BASE
    assert labels["org.opencontainers.image.revision"] == "abc123"
    assert labels["org.opencontainers.image.title"] == "enginesmith-build"


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (("enginesmith", "plan", "smollm2"), "smollm2"),
        (("make", "plan", "MODEL=smollm2", "PYTHON=python3"), "smollm2"),
        ((), "make engine MODEL="),
    ],
    ids=["enginesmith", "make", "default"],
)
@pytest.mark.parametrize("user", ["1000:1000", FOREIGN_UID])
def test_command_runs_without_network_on_a_read_only_root(
    client: DockerClient, built: Built, command: tuple[str, ...], shown: str, user: str
) -> None:
    done = run(client, NAME, *command, read_only=True, user=user)
    assert done.code == 0, done.output
    assert shown in done.output


def test_any_user_can_write_where_a_build_writes_and_nowhere_else(
    client: DockerClient, built: Built
) -> None:
    script = "for f in $HOME/x artifacts/x Makefile /opt/enginesmith/x; do test -w $(dirname $f)"
    script += " && test ! -e $f && touch $f && echo $f; done; id -u"
    done = run(client, NAME, "sh", "-c", script, user=FOREIGN_UID)
    written = done.output.split()
    assert written == ["/home/enginesmith/x", "artifacts/x", FOREIGN_UID.partition(":")[0]]


def test_mounted_checkout_is_run_instead_of_the_installed_code(
    client: DockerClient, built: Built, context: Path
) -> None:
    from docker.types import Mount

    mount = Mount("/enginesmith", str(context), type="bind", read_only=True)
    script = "make plan MODEL=smollm2 >&2 && python3 -c 'import pipeline; print(pipeline.__file__)'"
    done = run(client, NAME, "sh", "-c", script, mounts=[mount], user=FOREIGN_UID)
    assert done.code == 0, done.output
    assert "/enginesmith/pipeline/__init__.py" in done.output
    installed = run(client, NAME, "python3", "-c", "import pipeline; print(pipeline.__file__)")
    assert installed.output.startswith("/opt/enginesmith/lib/")
