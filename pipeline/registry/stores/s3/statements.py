"""Statements: each is one object, so readers see it whole or not at all.

    <version>.statements/<statement>.statement      the truth: a header line and the files' bytes
    <version>.statements/<statement>/<file>         copies, for browsers, curl and other tools

S3 makes one object visible at once and exclusively, never several. So all files of a statement go
into one, created with `If-None-Match`; that it is there is what counts, for this store's readers
the copies do not. The header is a line of JSON, `{"schema": 1, "files": {"report.json": 1234}}`:
names and sizes; the bytes follow in that order. The copies are written right after it; a run that
was killed in between has its copies made by the next one that puts this statement.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from pipeline.core.errors import ConflictError, CorruptError, NotFoundError, RecipeError
from pipeline.registry.reference import check_part
from pipeline.registry.stores.s3.bucket import Bucket, Found
from pipeline.registry.stores.store import Place, StoredStatement

_SUFFIX = ".statement"
_MAX_BYTES = 64 << 20
_MAX_HEAD_BYTES = 16 << 10  # a hundred files with the longest names
_THREADS = 8


def put_statement(bucket: Bucket, place: Place, name: str, files: Mapping[str, bytes]) -> bool:
    """Make a statement visible, unless its name is taken; whether this call has created it."""
    if not files:
        raise ValueError(f"statement {name} has no files")
    data = _packed({check_part("statement", file): content for file, content in files.items()})
    if len(data) > _MAX_BYTES:
        raise CorruptError(
            f"statement {name} of {place} has {len(data)} bytes, at most {_MAX_BYTES} are taken"
        )
    folder = bucket.address.statements(place)
    created = bucket.create(f"{folder}{check_part('statement', name)}{_SUFFIX}", data)
    stored = files if created else read_statement(bucket, place, name)
    copies = {found.key: found.size_bytes for found in bucket.listed(f"{folder}{name}/")}
    for file, content in stored.items():
        if copies.get(f"{folder}{name}/{file}") != len(content):
            bucket.write(f"{folder}{name}/{file}", content)
    return created


def require_same(bucket: Bucket, place: Place, name: str, files: Mapping[str, bytes]) -> None:
    """Raise unless a statement has just these files.

    Raises:
        ConflictError: It has others.
    """
    if read_statement(bucket, place, name) != dict(files):
        raise ConflictError(
            f"{bucket.url}: statement {name} of {place} holds other bytes; statements are only "
            "ever added, so give this one another name"
        )


def read_statement(bucket: Bucket, place: Place, name: str) -> dict[str, bytes]:
    """All files of one statement.

    Raises:
        NotFoundError: No such statement.
        CorruptError: It is longer than one may be, or was not written by us.
    """
    key = f"{bucket.address.statements(place)}{check_part('statement', name)}{_SUFFIX}"
    content = bucket.read(key, _MAX_BYTES)
    if content is None:
        raise NotFoundError(f"{bucket.url}: {place} has no statement {name}")
    start, sizes = _head(content.data, key)
    if start + sum(sizes.values()) != len(content.data):
        raise CorruptError(f"{bucket.url}: {key} is cut off, or too long")
    files = {}
    for file, size in sizes.items():
        files[file] = content.data[start : start + size]
        start += size
    return files


def list_statements(bucket: Bucket, place: Place) -> list[StoredStatement]:
    """What was said about a version, newest first; one that cannot be read has no sizes."""
    folder = bucket.address.statements(place)
    found = [
        one
        for one in bucket.listed(folder)
        if one.key.endswith(_SUFFIX) and _is_name(_name(one, folder))
    ]
    with ThreadPoolExecutor(_THREADS) as pool:
        sizes = list(pool.map(lambda one: _sizes(bucket, one), found))
    listed = [
        StoredStatement(name=_name(one, folder), made_s=one.modified_s, sizes=known)
        for one, known in zip(found, sizes, strict=True)
    ]
    return sorted(listed, key=lambda one: (one.made_s, one.name), reverse=True)


def _name(found: Found, folder: str) -> str:
    return found.key.removeprefix(folder).removesuffix(_SUFFIX)


def _is_name(text: str) -> bool:
    try:
        check_part("statement", text)
    except RecipeError:
        return False
    return True


def _sizes(bucket: Bucket, found: Found) -> Mapping[str, int]:
    """Sizes of the files, from the start of the object."""
    if not found.size_bytes:
        return {}
    response = bucket.call("get_object", found.key, Range=f"bytes=0-{_MAX_HEAD_BYTES - 1}")
    with response["Body"] as body:
        start = body.read(_MAX_HEAD_BYTES)
    try:
        return _head(start, found.key)[1]
    except CorruptError:
        return {}


def _packed(files: Mapping[str, bytes]) -> bytes:
    sizes = {file: len(content) for file, content in files.items()}
    head = json.dumps({"schema": 1, "files": sizes}).encode() + b"\n"
    return b"".join([head, *files.values()])


def _head(data: bytes, origin: str) -> tuple[int, dict[str, int]]:
    """Where the files' bytes start, and the sizes of the files."""
    end = data.find(b"\n", 0, _MAX_HEAD_BYTES)
    try:
        value = json.loads(data[: max(end, 0)])
        sizes: Mapping[str, int] = value["files"]
        if value["schema"] != 1 or not sizes or not _all_sizes(list(sizes.values())):
            raise ValueError("its header says nothing of use")
        return end + 1, {check_part("statement", file): size for file, size in sizes.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, RecipeError) as error:
        raise CorruptError(f"{origin} is not a statement: {error}") from error


def _all_sizes(values: Sequence[object]) -> bool:
    return all(type(value) is int and value >= 0 for value in values)
