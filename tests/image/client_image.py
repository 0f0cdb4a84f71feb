"""The pull image: how tests build it, and run it as a cluster would."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAME = "enginesmith-client:test"
USER = "65532:65532"
FOREIGN_USER = "4321:4321"
"""One that no /etc/passwd knows."""
LOCKED = (
    *("--read-only", "--tmpfs", "/tmp:size=64m", "--memory", "2g"),
    *("--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
)
"""What the deployment examples demand of the container."""


def make_image(host: str, context: Path, base: str, name: str) -> subprocess.CompletedProcess[str]:
    """`make image-client`, without network for what it runs."""
    return subprocess.run(
        [
            *("make", "image-client", f"BASE={base}", f"CLIENT_IMAGE={name}"),
            "ARGS=--network none --build-arg PIP_NO_INDEX=1",
        ],
        cwd=context,
        # The classic builder: the other one is a plug-in that may be missing.
        env={**os.environ, "DOCKER_HOST": host, "DOCKER_BUILDKIT": "0"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@dataclass(frozen=True, kw_only=True)
class Docker:
    """The `docker` command on an engine.

    Attributes:
        host: `DOCKER_HOST`.
    """

    host: str

    def __call__(self, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Run a command that must end with this exit code."""
        done = subprocess.run(
            ["docker", "--host", self.host, *arguments],
            env={**os.environ, "DOCKER_CONTENT_TRUST": "0"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == code, f"{arguments}: {done.stdout}{done.stderr}"
        return done

    def client(
        self, *arguments: str, options: Sequence[str] = (), network: str = "none", code: int = 0
    ) -> dict[str, Any]:
        """The JSON object of a command of the image, locked as in a cluster."""
        done = self(
            *("run", "--rm", *LOCKED, "--network", network, *options, NAME, *arguments, "--json"),
            code=code,
        )
        answer: dict[str, Any] = json.loads(done.stdout)
        assert answer["exit_code"] == code
        return answer

    def shell(self, script: str, *options: str, image: str = NAME) -> list[str]:
        """Lines that a shell script prints in a container."""
        run = ("run", "--rm", "--network", "none", "--entrypoint", "sh", *options)
        return self(*run, image, "-c", script).stdout.splitlines()

    def volume(self) -> Volume:
        """A new, empty volume."""
        name = f"volume-{secrets.token_hex(6)}"
        self("volume", "create", name)
        shown = self("volume", "inspect", "--format", "{{.Mountpoint}}", name)
        return Volume(name=name, path=Path(shown.stdout.strip()))


@dataclass(frozen=True, kw_only=True)
class Volume:
    """A named volume.

    Attributes:
        name: In the engine.
        path: Where the engine keeps it on this machine.
    """

    name: str
    path: Path

    def at(self, path: str) -> tuple[str, str]:
        """The options that mount it."""
        return "--volume", f"{self.name}:{path}"

    def left(self) -> list[str]:
        """What is in it, hidden files too."""
        return sorted(entry.name for entry in self.path.iterdir())


def read_only(source: Path, target: str) -> tuple[str, str]:
    """The options that mount a file or folder of this machine."""
    return "--mount", f"type=bind,source={source},target={target},readonly"
