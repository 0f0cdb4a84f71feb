"""Packages for the tests of the S3 store: a file of three parts and a small one."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.core.values import FileDigest, Package
from pipeline.registry.client.download import files_of
from pipeline.registry.reference import reference_of
from pipeline.registry.stores.s3 import S3Store
from pipeline.registry.stores.s3.claim import DEAD_S
from pipeline.registry.stores.store import Place

Bench = Any

PART_BYTES = 5 << 20
SIGNATURES = {"build-1": {"manifest.dsse.json": b'{"signed": 1}', "notes.html": b"<p>"}}


def sealed(bench: Bench, folder: Path, seed: int = 1, size_bytes: int = 11 << 20) -> Package:
    """A package whose bytes depend on the seed only."""
    folder.mkdir(parents=True)
    plan = random.Random(seed).randbytes(size_bytes)
    package: Package = bench.seal(folder, bench.engine(plan=plan))
    return package


def place_of(package: Package) -> Place:
    return Place.of(reference_of(package))


def read_file(store: S3Store, place: Place, file: FileDigest, offset: int = 0) -> bytes:
    with store.open_file(place, file, offset) as chunks:
        return b"".join(chunks)


def assert_whole(store: S3Store, package: Package) -> None:
    """A consumer sees exactly this package."""
    place = place_of(package)
    assert store.versions(place.name, place.variant) == [place.version]
    assert json.loads(store.read_manifest(place)) == package.manifest
    for file in files_of(package.manifest):
        assert read_file(store, place, file) == (package.dir / file.path).read_bytes()


def keys(store: S3Store) -> set[str]:
    """All keys below the store's prefix, and the open uploads, marked with `?`."""
    bucket = store._bucket()
    root = bucket.address.root
    found = {one.key.removeprefix(root) for one in bucket.listed(root)}
    return found | {f"{key.removeprefix(root)}?" for key, _, _ in bucket.uploads(root)}


def age_everything(server: Any, seconds: float = DEAD_S + 60) -> None:
    """Let everything in a server in memory be older."""
    for stored in (*server.objects.values(),):
        stored.modified_s = min(stored.modified_s, time.time() - seconds)
    for upload in server.uploads.values():
        upload.begun_s -= seconds


def child_job(store: S3Store, package: Package) -> Callable[[], object]:
    """Publish in a child process, with a connection of its own."""

    def job() -> None:
        os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")
        store.put_package(package, SIGNATURES)

    return job
