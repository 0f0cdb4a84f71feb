"""OCI: our publish and pull, with every digest, against `oras` without; on one loopback registry.

    pip install oras==0.2.43                                          # no run-time dependency
    python -m tests.benchmarks.registry_oci FOLDER 1000000000

Needs Debian's `docker-registry`. Each row is the median of alternating repeats in one process; page
cache warm. `oras` verifies no digest when it pulls (tried 2026-11-24), ours hashes every file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.registry.stores.store import Place

from pipeline.core.errors import CorruptError
from pipeline.core.values import FileDigest, Package
from pipeline.registry.reference import reference_of
from pipeline.registry.stores.oci import OciStore
from tests.benchmarks.registry_pulls import oras_client, oras_pull
from tests.benchmarks.sealing import seal_folder
from tests.services.docker_registry import running_server

_REPEATS = 3
_BLOCK_BYTES = 1 << 24


def bench(folder: Path, size_bytes: int) -> dict[str, float]:
    """Measure publish and pull of one package.

    Args:
        folder: Where to work; a tmpfs leaves the disk out of it. Five times `size_bytes` must fit.
        size_bytes: Of the package: two files of equal size, and small ones.

    Returns:
        Seconds of each side, and `pull_ratio` and `push_ratio`: the rate of ours over theirs.
    """
    os.environ["ENGINESMITH_CACHE"] = str(folder / "cache")
    package = _package(folder, size_bytes)
    place = Place.of(reference_of(package))
    ours_push, theirs_push, ours_pull, theirs_pull = [], [], [], []
    for repeat in range(_REPEATS):
        with running_server(folder / "registry") as registry:
            store = registry.store(f"ours-{repeat}")
            shutil.rmtree(folder / "cache", ignore_errors=True)
            ours_push.append(_timed(store.put_package, package, {}, lambda count: None))
            target = f"{registry.host}/theirs-{repeat}:engine"
            theirs_push.append(_timed(_oras_push, target, package))
            for _ in range(2):
                out = folder / "out"
                out.mkdir()
                ours_pull.append(_timed(pull, store, place, package, out))
                shutil.rmtree(out)
                out.mkdir()
                theirs_pull.append(_timed(oras_pull, target, out))
                shutil.rmtree(out)
        shutil.rmtree(folder / "registry")
    figures = {
        "ours_push_s": statistics.median(ours_push),
        "oras_push_s": statistics.median(theirs_push),
        "ours_pull_s": statistics.median(ours_pull),
        "oras_pull_s": statistics.median(theirs_pull),
    }
    figures["push_ratio"] = figures["oras_push_s"] / figures["ours_push_s"]
    figures["pull_ratio"] = figures["oras_pull_s"] / figures["ours_pull_s"]
    figures["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return figures


def pull(store: OciStore, place: Place, package: Package, out: Path) -> None:
    """Write every file, hashed as it lands; large files side by side."""
    files = [
        FileDigest(path=one["path"], size_bytes=one["size"], sha256=one["sha256"])
        for one in package.manifest["files"]
    ]

    def write(file: FileDigest) -> None:
        path = out / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with store.open_file(place, file) as chunks, path.open("wb", buffering=0) as stream:
            for chunk in chunks:
                digest.update(chunk)
                stream.write(chunk)
        if digest.hexdigest() != file.sha256:
            raise CorruptError(f"{path} has SHA-256 {digest.hexdigest()}, wanted {file.sha256}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, files))


def _package(folder: Path, size_bytes: int) -> Package:
    engine_dir = folder / "engine"
    engine_dir.mkdir()
    for name in ("rank0.engine", "rank1.engine"):
        with (engine_dir / name).open("wb") as stream:
            for start in range(0, size_bytes // 2, _BLOCK_BYTES):
                stream.write(os.urandom(min(_BLOCK_BYTES, size_bytes // 2 - start)))
    for name in ("config.json", "tokenizer.json"):
        (engine_dir / name).write_text("{}")
    staging = folder / "package"
    staging.mkdir()
    package = seal_folder(engine_dir, staging)
    shutil.rmtree(engine_dir)
    return package


def _oras_push(target: str, package: Package) -> None:
    paths = [str(package.dir / one["path"]) for one in package.manifest["files"]]
    # Not chunked, it reads a whole file into memory.
    oras_client().push(target=target, files=paths, disable_path_validation=True, do_chunked=True)


def _timed(call: Callable[..., object], *arguments: object) -> float:
    began = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - began


def main() -> None:
    """Print the figures as JSON."""
    logging.disable()
    with tempfile.TemporaryDirectory(dir=sys.argv[1]) as folder:
        print(json.dumps(bench(Path(folder), int(sys.argv[2])), indent=1))


if __name__ == "__main__":
    main()
