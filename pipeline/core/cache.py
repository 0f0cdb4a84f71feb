"""The stage cache: finished folders, keyed by what shaped them.

    result = cache.run("quantize", inputs, produce=lambda out: quantizer.write(weights, out))

`inputs` names everything that influences the bytes: digests of what goes in, settings, versions of
tools, and the digest of the stage's own source code (`source_digest`). A folder becomes visible by
one rename after `produce` returned, so a killed run leaves nothing that is taken for finished. Two
runs that want the same key wait for each other through a lock; should the lock not work (a network
file system may ignore it), each works in a folder of its own and the first rename wins.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.atomic_folder import atomic_folder
from pipeline.core.errors import CorruptError
from pipeline.core.values import FileDigest, digest_of

log = logging.getLogger(__name__)

RECORD = "stage.json"
"""Beside the outputs: inputs, digest of every file, seconds. Written last."""

_CHUNK_BYTES = 1 << 20
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


def cache_root() -> Path:
    """`$ENGINESMITH_CACHE`, else `~/.cache/enginesmith`."""
    configured = os.environ.get("ENGINESMITH_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "enginesmith"


def sha256_file(path: Path) -> str:
    """SHA-256 (hex) of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def digest_folder(folder: Path, skip: frozenset[str] = frozenset()) -> tuple[FileDigest, ...]:
    """Digest of every file below `folder`, sorted by POSIX path; `skip` names top-level files."""
    return tuple(
        FileDigest(
            path=path.relative_to(folder).as_posix(),
            size_bytes=path.stat().st_size,
            sha256=sha256_file(path),
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).as_posix() not in skip
    )


def source_digest(*modules: str) -> str:
    """SHA-256 over the source files of the named modules; a package counts with all below it.

    The modules are located, not imported, so that a key costs no heavy import.
    """
    digest = hashlib.sha256()
    for module in sorted(modules):
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(module)
        origin = Path(spec.origin)
        files = (
            sorted(path for path in origin.parent.rglob("*") if path.suffix in {".py", ".yaml"})
            if origin.name == "__init__.py"
            else [origin]
        )
        for path in files:
            digest.update(f"{module}:{path.name}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an advisory lock on `path` (created when missing); says so when it has to wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("Another run is making %s; waiting for it", path.stem)
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError as error:  # a file system without locks: the first rename wins
            if error.errno not in _NO_LOCKS:
                raise
        yield


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """A finished stage.

    Attributes:
        dir: Folder with its outputs.
        key: Digest of its inputs.
        digest: Digest of its outputs.
        cached: True if nothing had to be done.
        seconds: What it took when it was made.
    """

    dir: Path
    key: str
    digest: str
    cached: bool
    seconds: float

    def read_json(self, name: str) -> Any:
        """Parse one of its output files."""
        return json.loads((self.dir / name).read_text())


@dataclass(frozen=True, kw_only=True)
class StageCache:
    """Finished stages below `root`, one folder per stage and key."""

    root: Path

    def run(
        self, stage: str, inputs: Mapping[str, Any], produce: Callable[[Path], None]
    ) -> StageResult:
        """Return the finished folder for `inputs`, calling `produce` to fill it when it is missing.

        Args:
            stage: Name of the stage; part of the path.
            inputs: JSON values that name everything which influences the bytes.
            produce: Fills the (empty, private) folder that it is given, or raises.
        """
        key = digest_of({"stage": stage, **inputs})
        target = self.root / "stages" / stage / key[:24]
        with locked(self.root / "locks" / f"{stage}-{key[:24]}.lock"):
            if (found := self._read(target, key)) is not None:
                log.info("%s: already done (%s)", stage, key[:12])
                return found
            log.info("%s: started", stage)
            started = time.perf_counter()
            with atomic_folder(target) as private:
                produce(private)
                files = digest_folder(private)
                record = {
                    "stage": stage,
                    "key": key,
                    "inputs": dict(inputs),
                    "files": [file.to_json() for file in files],
                    "digest": digest_of([file.to_json() for file in files]),
                    "seconds": round(time.perf_counter() - started, 3),
                }
                (private / RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
            size_mb = sum(file.size_bytes for file in files) / 1e6
            log.info("%s: done in %.1f s, %.1f MB", stage, record["seconds"], size_mb)
        made = self._read(target, key)
        if made is None:
            raise CorruptError(f"{target} vanished while it was made; run the same command again")
        return StageResult(
            dir=made.dir, key=key, digest=made.digest, cached=False, seconds=made.seconds
        )

    def _read(self, target: Path, key: str) -> StageResult | None:
        """The finished stage at `target`, or None; a damaged one is removed and made again."""
        if not target.is_dir():
            return None
        try:
            record = json.loads((target / RECORD).read_text())
            whole = record["key"] == key and all(
                (target / file["path"]).stat().st_size == file["size"] for file in record["files"]
            )
        except (OSError, ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            log.warning("%s is damaged; making it again", target)
            shutil.rmtree(target)
            return None
        return StageResult(
            dir=target,
            key=key,
            digest=str(record["digest"]),
            cached=True,
            seconds=float(record["seconds"]),
        )
