"""One pull per process: `registry.py` measures it from start to exit, and here the call alone.

    python -m tests.benchmarks.registry_pulls NAME REGISTRY PACKAGE_DIR OUT

The call begins when its side's modules are imported, and nothing else is: clients and connections
are made within. Prints its seconds and the peak of the process's memory in MiB.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

POLICY = "policy.json"
"""Beside the package."""


def ours(url: str, package_dir: Path, out: Path) -> None:
    """All of `enginesmith pull`, without its cache."""
    from pipeline.registry.client.machine import Flags
    from pipeline.registry.client.pull import PullRequest, run

    digest = hashlib.sha256((package_dir / "manifest.json").read_bytes()).hexdigest()
    request = PullRequest(
        reference=f"tiny@sha256:{digest}",
        to=out / "ours",
        registry=url,
        flags=Flags(gpu="none"),
        policy=package_dir.parent / POLICY,
        accept_unproven=True,
        through_cache=False,
    )
    run(request)


def ours_unforced(url: str, package_dir: Path, out: Path) -> None:
    """`ours`, with nothing forced to the disk; for comparison only."""
    os.fsync = lambda fd: None
    ours(url, package_dir, out)


def boto3(url: str, package_dir: Path, out: Path) -> None:
    """`download_file` with its defaults."""
    import boto3

    bucket, prefix = url.removeprefix("s3://").split("/")
    boto3.client("s3").download_file(bucket, f"{prefix}/theirs", str(out / "theirs"))


def oras(url: str, package_dir: Path, out: Path) -> None:
    """What was pushed as `oras_target`."""
    oras_pull(oras_target(url), out)


def oras_client() -> Any:
    """`oras`, for a registry that speaks HTTP."""
    # Not a dependency, so no checker finds it.
    return importlib.import_module("oras.client").OrasClient(insecure=True)


def oras_pull(target: str, out: Path) -> None:
    """Pull with it; it verifies no digest."""
    oras_client().pull(target=target, outdir=str(out), allowed_media_type=[])


def oras_target(url: str) -> str:
    """Where its artifact lies in a registry of ours."""
    return f"{url.removeprefix('oci://')}/theirs:engine"


def peak_mib() -> float:
    """Peak of this process's memory, MiB."""
    status = Path("/proc/self/status").read_text()  # getrusage knows the parent's peak, too
    peak_kib = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return int(peak_kib) / 1024


PULLS = {pull.__name__: pull for pull in (ours, ours_unforced, boto3, oras)}


def modules(name: str, url: str) -> Iterator[str]:
    """What a pull imports sooner or later, and has to have before it is timed."""
    if not name.startswith("ours"):
        yield {"boto3": "boto3", "oras": "oras.client"}[name]
        return
    yield "pipeline.registry.client.pull"
    yield from ["boto3", "pipeline.registry.stores.s3.registry"] if url.startswith("s3:") else []
    yield from ["pipeline.registry.stores.oci.registry"] if url.startswith("oci:") else []


def main() -> None:
    """Pull once."""
    logging.disable()
    name, url, package_dir, out = sys.argv[1:]
    for module in modules(name, url):
        importlib.import_module(module)
    began = time.perf_counter()
    PULLS[name](url, Path(package_dir), Path(out))
    print(time.perf_counter() - began, peak_mib())


if __name__ == "__main__":
    main()
