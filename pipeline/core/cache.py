"""The stage cache: finished folders, keyed by what shaped them.

    result = cache.run(STAGE, inputs, produce=lambda out: quantizer.write(weights, out))

`inputs` names everything that influences the bytes; the stage adds its version. Every byte of a
kept folder is digested again before it is used, and a damaged one is made again. Of two runs that
want one key the second waits; on a file system without locks the first rename wins.
"""

from __future__ import annotations

import ast
import contextlib
import errno
import hashlib
import importlib.util
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.core.errors import CorruptError
from pipeline.core.ownership import CACHE, make_own, require_unshared, sync
from pipeline.core.published import FileDigest, digest_of
from pipeline.core.workfolder import hold_lock, remove_folder, work_folder

log = logging.getLogger(__name__)

PREFIX = ".enginesmith-work-"
"""Of the folders of `atomic_folder`, beside what they become."""
RECORD = "stage.json"
"""Beside the outputs: inputs, digest of every file, seconds. Written last."""


def sha256_file(path: Path) -> str:
    """SHA-256 (hex) of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_folder(folder: Path, skip: frozenset[str] = frozenset()) -> tuple[FileDigest, ...]:
    """Digest of every file below `folder`, sorted by POSIX path; `skip` names top-level files.

    CorruptError if something in it is neither a file nor a folder, such as a link.
    """
    digests = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise CorruptError(f"{path} is neither a file nor a folder; remove it")
        if path.is_file() and name not in skip:
            size_bytes = path.stat().st_size
            digests.append(FileDigest(path=name, size_bytes=size_bytes, sha256=sha256_file(path)))
    return tuple(digests)


def require_files(folder: Path, files: Sequence[FileDigest]) -> None:
    """Digest files again before they are used; CorruptError names one that has another digest."""
    for file in files:
        path = folder / file.path
        if not path.is_file() or sha256_file(path) != file.sha256:
            raise CorruptError(
                f"{path} is not the file that was fetched: its SHA-256 is another; remove {folder} "
                "and run the same command again"
            )


@contextlib.contextmanager
def atomic_folder(target: Path, setting: str = CACHE) -> Iterator[Path]:
    """A private folder that becomes `target` by one rename when the block ends.

    It is removed on any exception, Ctrl-C included, and where `target` was filled meanwhile.
    """
    make_own(target.parent, setting, 0o700 if setting == CACHE else 0o755)
    with work_folder(target.parent, PREFIX, setting=setting) as work:
        yield work.dir
        for path in [*work.dir.rglob("*"), work.dir]:  # or a crash may empty what the rename shows
            if path.is_file() or path == work.dir:
                sync(path)
        work.dir.chmod(0o755)
        try:
            work.dir.rename(target)
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
                raise


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """A finished stage: its folder, the digest of its inputs, and the digest of every output."""

    dir: Path
    key: str
    files: tuple[FileDigest, ...]

    @property
    def digest(self) -> str:
        return digest_of([file.to_json() for file in self.files])

    def read_json(self, name: str) -> Any:
        return json.loads((self.dir / name).read_text())


@dataclass(frozen=True, kw_only=True)
class StageCache:
    """Finished stages below `root`, one folder per stage and key."""

    root: Path

    def run(
        self, stage: Stage, inputs: Mapping[str, Any], produce: Callable[[Path], None]
    ) -> StageResult:
        """The finished folder for `inputs`; where it is missing, `produce` fills an empty one."""
        key = digest_of({**stage.identity, **inputs})
        target = self.root / "stages" / stage.name / key[:24]
        with hold_lock(self.root / "locks" / f"{stage.name}-{key[:24]}.lock"):
            if (found := self._read(target, key, made=False)) is not None:
                log.info("%s: already done (%s)", stage.name, key[:12])
                return found
            log.info("%s: started", stage.name)
            started = time.perf_counter()
            with atomic_folder(target) as private:
                produce(private)
                files = digest_folder(private)
                record = {
                    "key": key,
                    "inputs": {**stage.identity, **inputs},
                    "files": [file.to_json() for file in files],
                    "seconds": round(time.perf_counter() - started, 3),
                }
                (private / RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
            size_mb = sum(file.size_bytes for file in files) / 1e6
            log.info("%s: done in %.1f s, %.1f MB", stage.name, record["seconds"], size_mb)
            made = self._read(target, key, made=True)
        if made is None:
            raise CorruptError(f"{target} vanished while it was made; run the same command again")
        return made

    def _read(self, target: Path, key: str, *, made: bool) -> StageResult | None:
        """The finished stage at `target`, which `made` need not be digested; removed if damaged."""
        if not os.path.lexists(target):
            return None
        require_unshared(target, CACHE)
        with contextlib.suppress(CorruptError, OSError, ValueError, KeyError, TypeError):
            found = None if made else digest_folder(target, frozenset({RECORD}))
            record = json.loads((target / RECORD).read_text())
            files = tuple(FileDigest.from_json(file) for file in record["files"])
            if record["key"] == key and found in {None, files} and not target.is_symlink():
                return StageResult(dir=target, key=key, files=files)
        log.warning("%s is damaged; making it again", target)
        remove_folder(target)
        return None

    def keep_cpu_graph(self, build_key: str, folder: Path) -> None:
        """Remember which stage holds the CPU graph of a build, for `generate` on its package."""
        link = self._cpu_graph_link(build_key)
        make_own(link.parent, CACHE)
        key = json.loads((folder / RECORD).read_text())["key"]
        private = link.with_name(f".{link.name}.{os.getpid()}")
        private.write_text(f"{build_key} {folder.parent.name} {key}")
        private.replace(link)

    def cpu_graph(self, build_key: str) -> Path | None:
        """The folder with the CPU graph of a build, every byte digested; None if there is none."""
        with contextlib.suppress(OSError, ValueError):
            of, stage, key = self._cpu_graph_link(build_key).read_text().split()
            if of == build_key and "/" not in stage + key:
                found = self._read(self.root / "stages" / stage / key[:24], key, made=False)
                return found.dir if found else None
        return None

    def _cpu_graph_link(self, build_key: str) -> Path:
        return self.root / "cpu-graphs" / build_key[:24]


RECORD_FILE = Path(__file__).parent / "stages.yaml"
"""Stage -> version and digest of its code; one line each. `make record-stages` writes it."""

_DIGITS = 16
_NOT_CODE = frozenset({"ctx", "type_comment", "kind"})


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A step whose results are kept: `Stage(name="quantize", version=1, code=("pipeline.quant",))`.

    The version is part of every key; the code is not, so that a comment or a moved class rebuilds
    nothing. While the code is another than `RECORD_FILE` has at that version, its digest is part of
    the key as well: an edit that was not looked at never meets an old result. A contract test asks
    for the look: did the output change?
    """

    name: str  # of the folder in the cache, and of the line in `stages.yaml`
    version: int  # raise it when the same inputs give another output
    code: tuple[str, ...]  # modules that shape the output; a package counts with all below it

    @property
    def identity(self) -> dict[str, Any]:
        """What a key says of the stage."""
        known = {"stage": self.name, "version": self.version}
        recorded = _records().get(self.name) == self.record
        return known if recorded else {**known, "code": self.digest}

    @property
    def digest(self) -> str:
        return code_digest(self.code)

    @property
    def record(self) -> dict[str, Any]:
        return {"version": self.version, "code": self.digest}


@cache
def _records() -> dict[str, Any]:
    import yaml

    records: dict[str, Any] = yaml.safe_load(RECORD_FILE.read_text(encoding="utf-8")) or {}
    return records


@cache
def code_digest(modules: tuple[str, ...]) -> str:
    """Digest of what modules do: their statements, wherever among them and in which order.

    Comments, docstrings, layout and import paths do not count. The same on Python 3.11 to 3.13.
    """
    statements = {text for module in modules for path in _files(module) for text in _parse(path)}
    return hashlib.sha256("\n".join(sorted(statements)).encode()).hexdigest()[:_DIGITS]


def _files(module: str) -> list[Path]:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(module)
    origin = Path(spec.origin)
    return sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin]


@cache
def _parse(path: Path) -> tuple[str, ...]:
    """Each top-level statement of a file in a canonical form."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return tuple(text for node in _statements(tree.body) if (text := _form(node)))


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Those that do something: no documentation, no imports for types, no `Stage` itself."""
    for node in body:
        match node:
            case (
                ast.Expr(value=ast.Constant(value=str()))
                | ast.If(test=ast.Name(id="TYPE_CHECKING"))
                | ast.Assign(value=ast.Call(func=ast.Name(id="Stage")))
            ):
                continue
        yield node


def _form(node: object) -> str:
    """A node as text: its kind and what it holds, less positions and what is empty."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return ",".join(f"{name.name} as {name.asname}" for name in node.names if name.asname)
    if isinstance(node, ast.JoinedStr):
        node = _pieces(node.values)
    if isinstance(node, ast.AST):
        fields = [
            f"{name}={text}"
            for name, value in ast.iter_fields(node)
            if name not in _NOT_CODE and (text := _form(value))
        ]
        return f"{type(node).__name__}({' '.join(fields)})"
    if isinstance(node, list):
        if node and isinstance(node[0], ast.stmt):
            node = list(_statements(node))
        items = [text for item in node if (text := _form(item))]
        return f"[{' '.join(items)}]" if items else ""
    return "" if node is None else repr(node)


def _pieces(values: list[ast.expr]) -> list[ast.expr]:
    """The parts of an f-string, neighbouring text as one: versions of Python cut it differently."""
    joined: list[ast.expr] = []
    for node in values:
        text = node.value if isinstance(node, ast.Constant) else None
        before = joined[-1].value if joined and isinstance(joined[-1], ast.Constant) else None
        if isinstance(text, str) and isinstance(before, str):
            joined[-1] = ast.Constant(value=before + text)
        elif text != "":
            joined.append(node)
    return joined
