"""Registries with many packages: seconds of `list`, `show` and `gc`, each in a process of its own.

    python -m tests.benchmarks.registry_scale --packages 1000

Every package is signed and tested by trusted keys; a tenth have a channel that points to them. The
first listing of a bucket remembers the manifests that it verified, the later ones ask only for
what is new: both stand in the table. SeaweedFS runs on loopback.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.registry.stores import open_store
from tests.registry.team import Team
from tests.services import seaweed

_VERSIONS = 20
"""Packages of one recipe: so 50 recipes for 1,000 packages."""


def fill(url: str, folder: Path, packages: int) -> Path:
    """Publish `packages` packages; returns the policy that trusts them."""
    folder.mkdir(parents=True)
    team = Team(dir=folder, store=open_store(url))
    for number in range(packages):
        name = f"model{number // _VERSIONS}"
        package = team.publish(f"plan {number}".encode(), "accepted", name=name)
        if number % 10 == 0:
            team.enter(package)
    policy = folder / "policy.json"
    keys = [
        {"name": name, "public_key": key.public.pem.decode(), "may_sign": [right]}
        for name, key, right in (
            ("builder", team.builder, "builds"),
            ("tester", team.tester, "verdicts"),
            ("releaser", team.releaser, "channels"),
        )
    ]
    policy.write_text(json.dumps({"schema": 1, "keys": keys}))
    return policy


def timed(*command: str) -> float:
    """Seconds of one `enginesmith` command, from its start to its exit."""
    began = time.perf_counter()
    line = [sys.executable, "-m", "pipeline.cli", *command, "--json"]
    done = subprocess.run(line, stdout=subprocess.PIPE, check=True)
    took_s = time.perf_counter() - began
    json.loads(done.stdout)
    return took_s


def rows(kind: str, url: str, folder: Path, packages: int) -> Iterator[str]:
    """Fill a registry and time the commands that read all of it."""
    began = time.perf_counter()
    policy = fill(url, folder / f"{kind}-packages", packages)
    where = ("--registry", url, "--policy", str(policy))
    figures = [time.perf_counter() - began]
    figures += [
        timed("list", *where),
        timed("list", *where),
        timed("show", "model0:stable", *where),
    ]
    figures += [timed("gc", *where)]
    yield f"| {kind} | {packages:,} | " + " | ".join(f"{one:.2f}" for one in figures) + " |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Time the listing of a large registry.")
    parser.add_argument("--packages", type=int, default=1_000)
    given = parser.parse_args()
    before = os.getloadavg()[0]
    print("| registry | packages | fill, s | list, s | again, s | show, s | gc, s |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        os.environ["ENGINESMITH_CACHE"] = str(folder / "cache")
        print(*rows("folder", str(folder / "registry"), folder, given.packages), sep="\n")
        with seaweed.running_server(folder / "seaweed") as server:
            os.environ.update(server.environ)
            print(*rows("S3", f"s3://{seaweed.BUCKET}/scale", folder, given.packages), sep="\n")
    print(f"{os.cpu_count()} cores; load average before: {before:.1f}.")


if __name__ == "__main__":
    main()
