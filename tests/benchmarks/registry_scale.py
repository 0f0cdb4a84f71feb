"""Registries with many packages: seconds and requests of `list`, `show` and `gc`.

    python -m tests.benchmarks.registry_scale --packages 1000

Every package is signed and tested by trusted keys; a tenth have a channel that points to them. Each
command is a process of its own; the first `list` finds an empty cache. SeaweedFS and an OCI
registry run on loopback.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import resource
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.registry.stores import open_store
from tests.registry.team import Team
from tests.services import docker_registry, seaweed

_VERSIONS = 20
"""Packages of one recipe: so 50 recipes for 1,000 packages."""
_COUNT = "ENGINESMITH_BENCHMARK_COUNT"


def fill(url: str, folder: Path, packages: int) -> Path:
    """Publish `packages` packages; returns the policy that trusts them."""
    folder.mkdir(parents=True)
    team = Team(dir=folder, store=open_store(url))
    for number in range(packages):
        name = f"model{number // _VERSIONS}"
        package = team.publish(f"plan {number}".encode(), "accepted", name=name)
        if number % 10 == 0:
            team.enter(package)
    return team.policy_file()


def count_and_run(arguments: list[str]) -> None:
    """Run one `enginesmith` command in this process, and write down how often it asked."""
    asked, put = [0], http.client.HTTPConnection.putrequest

    def counted(self: Any, *args: Any, **more: Any) -> None:
        asked[0] += 1
        put(self, *args, **more)

    http.client.HTTPConnection.putrequest = counted  # type: ignore[method-assign]
    sys.argv = ["enginesmith", *arguments]
    try:
        runpy.run_module("pipeline.cli", run_name="__main__")
    finally:
        Path(os.environ[_COUNT]).write_text(str(asked[0]))


def measure(*command: str) -> str:
    """Seconds from start to exit, CPU seconds of that, and requests of one command."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    line = [sys.executable, "-m", "tests.benchmarks.registry_scale", "--", *command, "--json"]
    done = subprocess.run(line, stdout=subprocess.PIPE, check=True)
    took_s, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    json.loads(done.stdout)
    cpu_s = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return f"{took_s:.1f} ({cpu_s:.1f}), {int(Path(os.environ[_COUNT]).read_text()):,}"


def rows(kind: str, url: str, folder: Path, packages: int) -> Iterator[str]:
    """Fill a registry and measure the commands that read all of it."""
    policy = fill(url, folder / f"{kind}-packages", packages)
    where = ("--registry", url, "--policy", str(policy))
    commands = (["list"], ["list"], ["show", "model0:stable"], ["gc"])
    figures = [measure(*command, *where) for command in commands]
    yield f"| {kind} | {packages:,} | " + " | ".join(figures) + " |"


def main() -> None:
    """Print the table."""
    if sys.argv[1:2] == ["--"]:
        count_and_run(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description="Measure the listing of a large registry.")
    parser.add_argument("--packages", type=int, default=1_000)
    packages, before = parser.parse_args().packages, os.getloadavg()[0]
    print("| registry | packages | list, s (CPU), requests | again | show | gc |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        os.environ |= {"ENGINESMITH_CACHE": str(folder / "cache"), _COUNT: str(folder / "count")}
        print(*rows("folder", str(folder / "registry"), folder, packages), sep="\n")
        with seaweed.running_server(folder / "seaweed") as server:
            os.environ.update(server.environ)
            print(*rows("S3", f"s3://{seaweed.BUCKET}/scale", folder, packages), sep="\n")
        with docker_registry.running_server(folder / "oci") as registry:
            print(*rows("OCI", f"oci://{registry.host}/scale", folder, packages), sep="\n")
    print(f"{os.cpu_count()} cores; load average before: {before:.1f}.")


if __name__ == "__main__":
    main()
