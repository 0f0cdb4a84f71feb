"""The pods of docs/deploy, as far as an engine without a cluster runs them: the init containers.

Only the image's and the registry's names are replaced.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.core.published import Reference
from tests.image.client_image import NAME, Docker, read_only
from tests.registry.client.conftest import Shop, engine_files

pytestmark = pytest.mark.services

AWS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
"""What the secret in the example holds, and a region."""


def publish(shop: Shop) -> Reference:
    """A package that the examples ask for."""
    return shop.publish(name="phi3", runtime=("vllm", "0.24.0"))


def options_of(pod: dict[str, Any], volumes: dict[str, tuple[str, ...]]) -> list[str]:
    """Of `docker run`, for what a pod demands of its init container.

    Args:
        pod: Its `spec`.
        volumes: Name of each volume -> the options that mount it.
    """
    (container,) = pod["initContainers"]
    user, locked = pod["securityContext"], container["securityContext"]
    assert user["runAsNonRoot"]
    assert locked == {
        "readOnlyRootFilesystem": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }
    options = ["--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
    options += ["--user", f"{user['runAsUser']}:{user['runAsGroup']}"]
    if "fsGroup" in user:
        options += ["--group-add", str(user["fsGroup"])]
    if memory := container.get("resources", {}).get("limits", {}).get("memory"):
        options += ["--memory", memory.removesuffix("i").lower()]
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    return options + [word for words in volumes.values() for word in words]


def where(pod: dict[str, Any], volume: str, container: str = "initContainers") -> str:
    """Where a container of the pod sees a volume."""
    mounts = {mount["name"]: mount for mount in pod[container][0]["volumeMounts"]}
    if container == "containers":
        assert mounts[volume]["readOnly"]
    path: str = mounts[volume]["mountPath"]
    return path


def memory_of(pod: dict[str, Any]) -> tuple[str, ...]:
    """The options that mount the pod's `tmp`."""
    (volume,) = (volume for volume in pod["volumes"] if volume["name"] == "tmp")
    size = volume["emptyDir"]["sizeLimit"].removesuffix("i").lower()
    return "--tmpfs", f"{where(pod, 'tmp')}:size={size}"


def run(docker: Docker, pod: dict[str, Any], registry: str, options: list[str]) -> dict[str, Any]:
    """The init container, with the registry of the test."""
    (container,) = pod["initContainers"]
    assert container["image"] == NAME.partition(":")[0]
    assert "command" not in container, "it would replace the image's entry point"
    given = [argument.partition("=")[0] for argument in container["args"]]
    arguments = [
        f"--registry={registry}" if flag == "--registry" else argument
        for flag, argument in zip(given, container["args"], strict=True)
    ]
    assert given.count("--registry") == 1
    done = docker("run", "--rm", "--network", "host", *options, NAME, *arguments)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def config_map(folder: Path, policy: Path) -> Path:
    """The trust policy as the kubelet lays out a configMap, with its symbolic links."""
    trust = folder / "trust"
    now = trust / "..2026_11_25_16_00_00.1"
    now.mkdir(parents=True)
    policy.rename(now / "policy.yaml")
    (trust / "..data").symlink_to(now.name)
    (trust / "policy.yaml").symlink_to("..data/policy.yaml")
    return trust


def pod_of(name: str) -> dict[str, Any]:
    spec: dict[str, Any] = yaml.safe_load((Path("docs/deploy") / name).read_text())["spec"]
    return spec


def served(pod: dict[str, Any]) -> str:
    """What the server of the pod loads."""
    (server,) = pod["containers"]
    (model,) = (word for word in server["args"] if word.startswith("--model="))
    return str(model.partition("=")[2])


def test_init_container_pulls_what_the_server_loads(
    docker: Docker, shop_of: Callable[[str], Shop], tmp_path: Path
) -> None:
    pod, shop = pod_of("init-container.yaml"), shop_of("s3")
    reference = publish(shop)
    models = tmp_path / "models"  # as the kubelet makes an emptyDir: of root, open to the group
    models.mkdir()
    os.chown(models, 0, pod["securityContext"]["fsGroup"])
    models.chmod(0o2770)
    volumes = {
        "models": ("--volume", f"{models}:{where(pod, 'models')}"),
        "trust": read_only(config_map(tmp_path, shop.policy()), where(pod, "trust")),
        "tmp": memory_of(pod),
    }
    options = options_of(pod, volumes)
    for name in (*AWS, "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL_S3"):
        options += ["--env", name]
    done = run(docker, pod, shop.store.url, options)
    assert (done["digest"], done["proven"]) == (reference.digest, "proven")
    assert done["unknown"] == []

    assert served(pod) == f"{done['dir']}/engine"
    assert where(pod, "models", "containers") == where(pod, "models")
    pulled = models / Path(served(pod)).relative_to(where(pod, "models"))
    assert "model.plan" in engine_files(pulled.parent)
    assert pulled.stat().st_uid == pod["securityContext"]["runAsUser"]
    assert [path.name for path in models.iterdir()] == ["phi3"]


def test_mounted_image_is_verified_where_the_server_loads_it(
    docker: Docker, shop_of: Callable[[str], Shop], tmp_path: Path
) -> None:
    """`docker pull` and `docker cp` stand for the kubelet, which mounts the image's root."""
    pod, shop = pod_of("mounted-image.yaml"), shop_of("oci")
    reference = publish(shop)
    registry = shop.store.url.removeprefix("oci://")
    tag = f"{registry}/phi3:{reference.variant}_{reference.version}"
    docker("pull", tag)
    container = docker("create", tag, "-").stdout.strip()
    image = tmp_path / "image"
    image.mkdir()
    docker("cp", f"{container}:/models", str(image))
    docker("rm", container)
    volumes = {
        "engine": read_only(image, where(pod, "engine")),
        "trust": read_only(config_map(tmp_path, shop.policy()), where(pod, "trust")),
        "tmp": memory_of(pod),
    }
    done = run(docker, pod, shop.store.url, options_of(pod, volumes))
    assert (done["digest"], done["came_from"]) == (reference.digest, "verified")
    assert (done["proven"], done["fetched_bytes"]) == ("proven", 0)
    assert served(pod) == f"{done['dir']}/engine"
    assert where(pod, "engine", "containers") == where(pod, "engine")
    assert "model.plan" in engine_files(image / "models")
