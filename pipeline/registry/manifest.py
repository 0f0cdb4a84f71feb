"""`manifest.json`: what a package is, and the size and SHA-256 of every file in it.

Its bytes are RFC 8785 canonical JSON; their SHA-256 is the digest that names the package. It holds
only what the build determines: no times, no measurements, and not its own version, which every
reader derives. So the same build output has the same digest whenever and wherever it is sealed.

Reading is strict, since a manifest decides what is loaded into a GPU: bounded, canonical bytes
only, the known schema only, and paths that cannot leave the package. Unknown keys are refused: a
`match` rule that a reader does not know could be the one that says "not on this card". So is a
folder (`verify`): an extra file, a link or a FIFO is damage, since nothing checks what is not
listed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import rfc8785
from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from pipeline.core.errors import CorruptError, RecipeError
from pipeline.core.published import FileDigest, Package, Redistribution
from pipeline.core.settings import STRICT
from pipeline.registry.disk import disk_errors, file_fault, open_regular, read_bounded
from pipeline.registry.reference import check_part, derive_version, is_device_name
from pipeline.registry.store import Place, Reader

SCHEMA = 1
MANIFEST = "manifest.json"
ENGINE = "engine"
MAX_MANIFEST_BYTES = 4 << 20
"""About 30,000 files; an engine has some ten. The manifest limit of OCI registries, too
(distribution-spec 1.1, "Pushing manifests")."""
_MAX_COMPONENT_BYTES = 255
"""NAME_MAX of ext4, XFS, Btrfs, APFS and NTFS."""
_FORBIDDEN = frozenset('\\:*?"<>|')
"""What a file name may not have on Windows, besides control characters and slashes; a colon opens
an alternate stream there (Microsoft, "Naming Files, Paths, and Namespaces")."""
_ODD_NUMBER = re.compile(rb"[\[:,]-?(?:[0-9]{16}|[0-9]+\.0[,\]}]|[0-9.]+[eE])")
"""A number that Python does not write, or refuse, as RFC 8785 does; a text that looks like one."""
_MAX_FAULT = 500
"""Characters of a message that quotes a manifest."""
_MAX_PATH_BYTES = 1024
"""Leaves three quarters of Linux's PATH_MAX (4096) to where a package is unpacked; also the longest
S3 key."""

# The largest integer that every JSON reader keeps exact (RFC 8785, section 3.2.2.3): 2^53 - 1.
_Count = Annotated[int, Field(ge=1, le=2**53 - 1)]
_Bytes = Annotated[int, Field(ge=0, le=2**53 - 1)]
_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_Text = Annotated[str, Field(pattern=r"^[^\p{C}\p{Zl}\p{Zp}]+$")]
"""One printable line."""


class _Part(BaseModel):
    model_config = STRICT


class _File(_Part):
    path: _Text  # relative to the package
    size: _Bytes
    sha256: _Sha256


class _Runtime(_Part):
    name: _Text
    version: _Text


class _Match(_Part):  # an empty list or null means any
    sm: list[_Count]
    cards: list[_Text]
    min_vram_bytes: _Bytes
    runtime: _Runtime
    cuda: _Text | None
    driver_min: _Text | None


class _Limits(_Part):
    max_batch_size: _Count
    max_seq_len: _Count
    max_num_tokens: _Count
    kv_cache_dtype: _Text


class _Serve(_Part):
    args: list[str]


class _Source(_Part):
    origin: _Text
    commit: _Text | None
    digest: _Sha256
    note: str
    random: bool


class _Build(_Part):
    tools: dict[str, str]
    config: dict[str, Any]


class _Licence(_Part):
    spdx: _Text
    files: list[_Text]
    redistribution: Redistribution
    notice: str


@dataclass(frozen=True, kw_only=True, config=STRICT)
class _Manifest:
    schema: Literal[1]
    name: str
    variant: str
    recipe_version: str
    build_key: _Sha256
    format: _Text
    quantization: _Text
    files: Annotated[list[_File], Field(min_length=1)]
    match: _Match
    limits: _Limits
    serve: _Serve
    source: _Source
    ledger: dict[str, Any]
    build: _Build
    licence: _Licence

    def __post_init__(self) -> None:
        for part in ("name", "variant", "recipe_version"):
            check_part(part, getattr(self, part))
        paths = [file.path for file in self.files]
        if fault := paths_fault(paths):
            raise ValueError(f"files: {fault}")
        if paths != sorted(paths):
            raise ValueError("files: not sorted by path")
        for path in paths:
            if not path.startswith("engine/"):
                raise ValueError(f"files: {path!r} is not below engine/")


def manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    """The bytes whose SHA-256 is the package's digest.

    CorruptError if a value has no canonical JSON: NaN, an integer above 2^53, an object.
    """
    try:
        return rfc8785.dumps(dict(manifest))
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"a manifest cannot hold this: {error}") from error


def digest_bytes(data: bytes) -> str:
    """SHA-256 (hex) of a manifest's bytes."""
    return hashlib.sha256(data).hexdigest()


def read_manifest(path: Path) -> tuple[dict[str, Any], str]:
    """Content and digest of a `manifest.json`; raises like `parse_manifest`."""
    data = read_bounded(path, MAX_MANIFEST_BYTES)
    return parse_manifest(data, str(path)), digest_bytes(data)


def manifest_at(store: Reader, place: Place) -> tuple[dict[str, Any], str]:
    """The manifest of a published version, and its digest.

    NotFoundError if there is none, CorruptError if it breaks a rule or lies in another's place.
    """
    data = store.read_manifest(place)
    manifest, digest = parse_manifest(data, f"{store.url}: manifest of {place}"), digest_bytes(data)
    version = derive_version(manifest, digest)
    own = Place(name=manifest["name"], variant=manifest["variant"], version=version)
    if own != place:
        raise CorruptError(
            f"{store.url}: what lies under {place} is {own}; who may write there put it in the "
            "wrong place, so remove it"
        )
    return manifest, digest


def files_of(manifest: Mapping[str, Any]) -> list[FileDigest]:
    """The files that a manifest lists, sorted by path."""
    return [
        FileDigest(path=file["path"], size_bytes=file["size"], sha256=file["sha256"])
        for file in manifest["files"]
    ]


def parse_manifest(data: bytes, origin: str) -> dict[str, Any]:
    """The content of a manifest's bytes; CorruptError names the rule that it breaks."""
    try:
        value = json.loads(data.decode())
        if not isinstance(value, dict):
            raise ValueError("it is not a JSON object")
        canonical = _is_canonical(value, data)  # so a key twice and NaN are refused, too
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{origin} is not a manifest: {error}") from error
    schema = value.get("schema")
    if type(schema) is not int or schema != SCHEMA:
        raise CorruptError(
            f"{origin} has schema {repr(schema)[:40]}, this program reads {SCHEMA}; "
            "if a newer enginesmith wrote it, upgrade"
        )
    if not canonical:
        raise CorruptError(f"{origin} is not RFC 8785 canonical JSON, so its digest means nothing")
    try:
        TypeAdapter(_Manifest).validate_json(data)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(str(step) for step in fault['loc'])}: {fault['msg']}".removeprefix(": ")
            for fault in error.errors(include_url=False, include_input=False)[:3]
        )
        raise CorruptError(f"{origin}: {faults[:_MAX_FAULT]}") from error
    except RecipeError as error:
        raise CorruptError(f"{origin}: {error}") from error
    return value


def _is_canonical(value: dict[str, Any], data: bytes) -> bool:
    """Whether bytes are RFC 8785: what Python writes is, if it is plain, and ten times as fast."""
    plain = data.isascii() and not _ODD_NUMBER.search(data)
    as_rfc: dict[str, Any] = {"sort_keys": True, "ensure_ascii": False, "allow_nan": False}
    written = json.dumps(value, separators=(",", ":"), **as_rfc).encode()
    return (plain and written == data) or rfc8785.dumps(value) == data


def verify(package_dir: Path, beside: Callable[[str], bool] = lambda path: False) -> Package:
    """Check that a folder is a whole, unchanged package: names, sizes, and every byte.

    `beside` tells whether a path may be there, as a plain file, although no manifest lists it.
    CorruptError if anything is missing, too much, or different; names it.
    """

    def damaged(path: str, fault: str) -> CorruptError:
        return CorruptError(f"{package_dir}: {path!r} {fault}")

    with disk_errors(f"verify {package_dir}"):
        manifest, digest = read_manifest(package_dir / MANIFEST)
        wanted = {file.path: file for file in files_of(manifest)}
        folders = {folder for path in wanted for folder in folders_of(path)}
        found = walk(package_dir, lambda path: path in folders or beside(path))
        for path, status in sorted(found.items()):
            if status.st_nlink != 1:
                fault = f"has {status.st_nlink} hard links, so another name may change it"
                raise damaged(path, f"{fault}; put a copy in its place")
        found.pop(MANIFEST, None)
        if missing := wanted.keys() - found.keys():
            raise damaged(min(missing), "is missing")
        if extra := {path for path in found.keys() - wanted.keys() if not beside(path)}:
            raise damaged(min(extra), "is not in its manifest")
        for path, file in sorted(wanted.items()):
            if (size := found[path].st_size) != file.size_bytes:
                raise damaged(path, f"has {size} bytes, its manifest says {file.size_bytes}")
            with open_regular(package_dir / path) as stream:
                sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            if sha256 != file.sha256:
                raise damaged(path, f"has SHA-256 {sha256}, its manifest says {file.sha256}")
    return Package(dir=package_dir, manifest=manifest, digest=digest)


def walk(
    folder: Path, may_be_folder: Callable[[str], bool] = lambda path: True
) -> dict[str, os.stat_result]:
    """Every file below `folder`, by relative POSIX path; all but files and folders is damage.

    `may_be_folder` tells whether a folder may be there.
    """
    if not stat.S_ISDIR(folder.lstat().st_mode):
        raise CorruptError(f"{folder} is not a folder")
    found: dict[str, os.stat_result] = {}
    pending = [""]
    while pending:
        prefix = pending.pop()
        with os.scandir(folder / prefix) as entries:
            for entry in entries:
                path = f"{prefix}{entry.name}"
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode):
                    if not may_be_folder(path):
                        raise CorruptError(f"{folder}: folder {path!r} is not in its manifest")
                    pending.append(f"{path}/")
                elif fault := file_fault(status.st_mode):
                    raise CorruptError(f"{folder}: {path!r} {fault}")
                else:
                    found[path] = status
    return found


def path_fault(path: str) -> str:
    """What is wrong with one path; empty if nothing is.

    A path is relative, POSIX, in Unicode NFC, and means the same file on every file system.
    """
    try:
        encoded = path.encode()
    except UnicodeEncodeError:
        return "is not valid Unicode"
    if not path:
        return "is empty"
    if not path.isprintable():
        return "has a control or unprintable character"
    if found := _FORBIDDEN.intersection(path):
        return f"has the character {min(found)!r}"
    if path.startswith("/"):
        return "is absolute"
    if unicodedata.normalize("NFC", path) != path:
        return "is not in Unicode normal form NFC"
    if len(encoded) > _MAX_PATH_BYTES:
        return f"is longer than {_MAX_PATH_BYTES} bytes"
    for component in path.split("/"):
        if component in {"", ".", ".."}:
            return f"has the component {component!r}"
        if component[-1] in ". " or is_device_name(component):
            return f"has the component {component!r}, which Windows takes for another file"
        if len(component.encode()) > _MAX_COMPONENT_BYTES:
            return f"has a component longer than {_MAX_COMPONENT_BYTES} bytes"
    return ""


def paths_fault(paths: Iterable[str]) -> str:
    """What is wrong with a set of paths, each named in the answer; empty if nothing is.

    Besides each path alone: duplicates, a file that is also a folder, and names that some file
    systems take for one (case, Unicode).
    """
    spelling: dict[str, str] = {}  # what a case-insensitive file system sees -> how it is written
    files: set[str] = set()
    folders: set[str] = set()
    for path in paths:
        if fault := path_fault(path):
            return f"{path!r} {fault}"
        if path in files:
            return f"{path!r} is there twice"
        files.add(path)
        folders.update(folders_of(path))
    for path in (*files, *folders):
        key = unicodedata.normalize("NFC", path.casefold())
        if spelling.setdefault(key, path) != path:
            return f"{path!r} and {spelling[key]!r} are one file on some systems"
    if both := files & folders:
        return f"{min(both)!r} is both a file and a folder"
    return ""


def folders_of(path: str) -> list[str]:
    """The folders that lead to a file: `a/b/c` -> `a`, `a/b`."""
    parts = path.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]
