"""Dockerfile.client, built by make on a real engine without network, on a stand-in for its base."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipeline.core.errors import ExitCode
from pipeline.core.published import Reference
from tests.image.client_image import FOREIGN_USER, LOCKED, NAME, USER, Docker, read_only
from tests.registry.backends import backends
from tests.registry.client.conftest import Shop, engine_files

if TYPE_CHECKING:
    from docker import DockerClient

pytestmark = pytest.mark.services

SIZE_BYTES = 110_000_000
"""What the image may add to its base; it was 84 MB, mostly botocore's (2026-11-25)."""
FILES: Mapping[str, bytes] = {
    "model.plan": bytes(range(256)) * 200,
    "config.json": b"{}",
    "empty": b"",
}
SITE = "/opt/enginesmith/lib/python3.11/site-packages"
POLICY = "/etc/enginesmith/policy.yaml"


@dataclass(frozen=True, kw_only=True)
class Published:
    """A shop, and what a container needs to pull from it.

    Attributes:
        registry: As the container calls it.
        options: Of `docker run`: registry, credentials and policy.
        network: Of the container.
    """

    shop: Shop
    reference: Reference
    registry: str
    options: tuple[str, ...]
    network: str

    @property
    def ask(self) -> tuple[str, ...]:
        return ("pull", "tiny", "--registry", self.registry)


@pytest.fixture
def published_on(shop_of: Callable[[str], Shop]) -> Callable[[str], Published]:
    """A registry with one signed package in it."""

    def make(backend: str) -> Published:
        shop = shop_of(backend)
        reference = shop.publish(FILES)
        options: tuple[str, ...] = read_only(shop.policy(), POLICY)
        registry, network = shop.store.url, "host"
        if backend == "folder":
            options += read_only(Path(registry), "/registry")
            registry, network = "/registry", "none"
        if backend == "s3":
            names = ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "DEFAULT_REGION", "ENDPOINT_URL_S3")
            options += tuple(word for name in names for word in ("--env", f"AWS_{name}"))
        return Published(
            shop=shop,
            reference=reference,
            registry=registry,
            options=options,
            network=network,
        )

    return make


def distributions(lines: list[str]) -> set[str]:
    """Names of wheels, or of their folders of metadata."""
    return {line.partition("-")[0].lower() for line in lines}


def test_image_says_what_it_is_and_is_not_root(client: DockerClient, docker: Docker) -> None:
    config = client.images.get(NAME).attrs["Config"]
    assert config["User"] == USER
    assert (config["Entrypoint"], config["Cmd"]) == (["enginesmith"], ["pull", "--help"])
    assert config["WorkingDir"] == "/models"
    assert not config.get("Volumes"), "an anonymous volume would hide a mistake in the mounts"
    assert config["Labels"]["org.opencontainers.image.title"] == "enginesmith-client"
    assert docker.shell("id -u; id -g") == USER.split(":")
    assert "Usage: enginesmith pull" in docker("run", "--rm", "--network", "none", NAME).stdout


def test_image_holds_the_light_install_and_nothing_else(
    client: DockerClient, docker: Docker, debian: str, client_context: Path
) -> None:
    wheels = distributions([path.name for path in (client_context / "wheels").iterdir()])
    listed = docker.shell(f"cd {SITE} && ls -d *.dist-info")
    assert distributions(listed) == wheels - {"setuptools"} | {"enginesmith"}
    heavy = ("torch", "numpy", "transformers", "onnx", "tensorrt", "model_signing", "pip", "tests")
    for name in heavy:
        assert docker.shell(f"ls -d {SITE}/{name} 2>/dev/null || true") == []
    assert docker.shell("find / -xdev -name '*.whl' 2>/dev/null || true") == []
    assert docker.shell("ls -d /src /wheels 2>/dev/null || true") == []
    sizes = [client.images.get(name).attrs["Size"] for name in (debian, NAME)]
    assert sizes[1] - sizes[0] < SIZE_BYTES


def test_user_can_write_to_volumes_and_temporary_files_alone(docker: Docker, debian: str) -> None:
    script = r"find / -xdev \( -type d -o -type f \) -writable -not -path '/proc/*' 2>/dev/null"
    base = docker.shell(f"{script} || true", "--user", USER, image=debian)
    assert set(docker.shell(f"{script} || true")) == {*base, "/cache", "/models"}
    tries = "for f in /x /opt/enginesmith/x /cache/x /models/x /var/tmp/x /tmp/x; do "
    tries += "touch $f 2>/dev/null && echo $f; done; true"
    assert docker.shell(tries, *LOCKED) == ["/tmp/x"]


@pytest.mark.parametrize("backend", backends)
def test_image_pulls_into_a_volume(
    docker: Docker, published_on: Callable[[str], Published], backend: str
) -> None:
    published, models, packages = published_on(backend), docker.volume(), docker.volume()
    mounts = (*models.at("/models"), *packages.at("/cache"))
    done = docker.client(
        *(*published.ask, "--to", "/models/tiny", "--gpu", "rtx4090"),
        options=(*published.options, *mounts),
        network=published.network,
    )
    assert (done["digest"], done["proven"]) == (published.reference.digest, "proven")
    pulled = models.path / "tiny"
    assert engine_files(pulled) == FILES
    assert {path.stat().st_uid for path in pulled.rglob("*")} == {65532}
    assert models.left() == ["tiny"]

    # Another container, without registry and network; what was pulled is mounted read-only.
    filled = (*published.options[:2], *models.at("/models:ro"))
    ask = ("verify", "/models/tiny", "--gpu")
    verified = docker.client(*ask, "rtx4090", options=filled)
    assert (verified["digest"], verified["came_from"]) == (published.reference.digest, "verified")
    docker.client(*ask, "l4", options=filled, code=ExitCode.INCOMPATIBLE)
    (pulled / "engine" / "empty").chmod(0o644)
    (pulled / "engine" / "empty").write_bytes(b"!")
    docker.client(*ask, "rtx4090", options=filled, code=ExitCode.CORRUPT)

    # And one that takes it from the cache which all share.
    cached = ("pull", f"tiny@sha256:{published.reference.digest}", "--registry", "/cache/packages")
    again = docker.client(
        *(*cached, "--gpu", "rtx4090", "--to", "/models/again"),
        options=(*published.options[:2], *mounts),
        code=ExitCode.NOT_FOUND if backend == "folder" else ExitCode.OK,
    )
    assert again.get("came_from") == (None if backend == "folder" else "cache")


def test_any_user_can_pull_and_the_stock_tool_verifies_it(
    docker: Docker, published_on: Callable[[str], Published]
) -> None:
    published, models = published_on("folder"), docker.volume()
    options = (*published.options, *models.at("/models"), "--user", FOREIGN_USER)
    docker.client(*published.ask, "--to=/models/tiny", "--gpu=rtx4090", options=options)
    engine = models.path / "tiny" / "engine"
    assert engine.stat().st_uid == int(FOREIGN_USER.partition(":")[0])
    public = published.shop.home / "release.pub"
    public.write_bytes(published.shop.key.public.pem)
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(engine)]
    command += ["--public_key", str(public), "--signature", str(engine / "model.sig")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (engine / "more").touch()
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0


def test_stopped_container_ends_as_a_pull_that_was_interrupted(
    docker: Docker, published_on: Callable[[str], Published]
) -> None:
    """A process with number 1 gets no signal that it has not asked for; Python asks for SIGINT."""
    published, models = published_on("folder"), docker.volume()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(60.0)
        run = (*LOCKED, "--network", "host", *published.options, *models.at("/models"))
        ask = ("pull", "tiny", "--to=/models/tiny", "--gpu=rtx4090", "--json")
        registry = f"--registry=oci://127.0.0.1:{silent.getsockname()[1]}/engines"
        name = docker("run", "--detach", *run, NAME, *ask, registry).stdout.strip()
        connection, _ = silent.accept()
        with connection:
            docker("stop", "--time", "10", name)
        state = docker("inspect", "--format", "{{.State.ExitCode}}", name).stdout.strip()
        answer = docker("logs", name).stdout
        docker("rm", name)
    assert state == str(ExitCode.INTERRUPTED)
    assert json.loads(answer)["exit_code"] == ExitCode.INTERRUPTED
    assert models.left() == []
