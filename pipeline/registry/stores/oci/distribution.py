"""The distribution API of one repository (distribution-spec 1.1): manifests, blobs, tags.

Every document and every small blob is bounded in size and compared to its digest here. Large blobs
are streamed unchecked; their reader knows what they must be.
"""

from __future__ import annotations

import contextlib
import random
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin, urlsplit

from pipeline.core.errors import AccessError, CorruptError, NotFoundError, TransientError
from pipeline.registry.stores.oci.documents import (
    INDEX_TYPE,
    MANIFEST_TYPE,
    MAX_DOCUMENT_BYTES,
    Descriptor,
    Document,
    describe,
    digest_of,
    parse_index,
    parse_object,
)
from pipeline.registry.stores.oci.transport import Reply, Request, Transport

_MAX_SKIP_BYTES = 64 << 20
"""What is read and thrown away where a server ignores `Range`."""
_MAX_PAGES = 3_000
"""Three million names; a server that lists more is not a registry, or never ends."""
_PAGE = 1000
_TRIES = 4
_LINK = re.compile(r'<([^>]*)>\s*;.*\brel="?next"?')
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(?:\d+|\*)")
_ACCEPT = {"Accept": f"{MANIFEST_TYPE}, {INDEX_TYPE}"}


@dataclass(frozen=True, kw_only=True)
class Repository:
    """One repository of a registry.

    Attributes:
        transport: The way there.
        name: Such as `engines/phi3`.
    """

    transport: Transport
    name: str

    def __str__(self) -> str:
        return f"{urlsplit(self.transport.api).netloc}/{self.name}"

    def manifest(self, reference: str) -> Document | None:
        """The manifest or index with a tag or digest; None if there is none.

        Raises:
            CorruptError: Its bytes have not the digest that was asked, or that the server states.
        """
        origin = f"{self}:{reference}"
        request = self._request(
            "GET", f"manifests/{reference}", f"read {origin}", (200, 404), headers=_ACCEPT
        )
        reply = self.transport.ask(request, MAX_DOCUMENT_BYTES)
        if reply.status == 404:
            return None
        kind = reply.headers.get("Content-Type", "").partition(";")[0].strip()
        if kind == "text/html":
            raise TransientError(f"{origin} is answered by a web page; is a proxy in the way?")
        document = Document(media_type=kind, data=reply.body)
        stated = reply.headers.get("Docker-Content-Digest", document.digest)
        wanted = reference if reference.startswith("sha256:") else document.digest
        if document.digest not in {stated} & {wanted}:
            raise CorruptError(
                f"{origin} has digest {document.digest}, wanted {wanted} and the registry says "
                f"{stated[:80]!r}"
            )
        return document

    def put_manifest(self, reference: str, document: Document) -> None:
        """Write a manifest under a tag or its digest; what the tag named is replaced."""
        request = self._request(
            "PUT",
            f"manifests/{reference}",
            f"write {self}:{reference}",
            (200, 201, 202),
            headers={"Content-Type": document.media_type},
            body=document.data,
        )
        for attempt in range(1, _TRIES):
            try:
                self.transport.ask(request)
                return
            except TransientError:  # a blob that was uploaded is not seen yet
                time.sleep(0.1 * 2**attempt * random.uniform(0.5, 1.0))
        self.transport.ask(request)

    def delete_manifest(self, digest: str) -> bool:
        """Remove a manifest and its tags. False if it is not there.

        Raises:
            AccessError: The registry is not set to delete.
        """
        request = self._request("DELETE", f"manifests/{digest}", "delete", (200, 202, 404))
        return self.transport.ask(request).status != 404

    def has_blob(self, blob: Descriptor) -> bool:
        """Whether a blob of this digest and size is there."""
        request = self._request(
            "HEAD", f"blobs/{blob.digest}", f"look for a blob in {self}", (200, 404), write=True
        )
        reply = self.transport.ask(request)
        return reply.status == 200 and reply.headers.get("Content-Length") == str(blob.size_bytes)

    def blob(self, blob: Descriptor, limit_bytes: int) -> bytes:
        """A small blob, checked.

        Raises:
            NotFoundError: It is not there.
            CorruptError: It has other bytes, or more than `limit_bytes`.
        """
        data = blob.data
        if data is None:
            if blob.size_bytes > limit_bytes:
                raise CorruptError(
                    f"{self}: a blob of {blob.size_bytes} bytes; at most {limit_bytes} are read"
                )
            request = self._request("GET", f"blobs/{blob.digest}", f"read from {self}", (200,))
            data = self.transport.ask(request, blob.size_bytes).body
        found = digest_of(data)
        if found != blob.digest:
            raise CorruptError(f"{self}: blob {blob.digest} has digest {found}")
        return data

    @contextlib.contextmanager
    def open_blob(self, digest: str, start: int, end: int) -> Iterator[Iterator[bytes]]:
        """The bytes of a blob from `start` up to and without `end`, unchecked, in chunks.

        Raises:
            NotFoundError: No such blob.
            CorruptError: It is shorter than `start`.
            TransientError: The connection broke, also while iterating; or the server ignores
                `Range`, and too much precedes `start`.
        """
        request = self._request(
            "GET",
            f"blobs/{digest}",
            f"read from {self}",
            (200, 206, 416),
            headers={"Range": f"bytes={start}-{end - 1}"},
        )
        with self.transport.open(request) as (reply, chunks):
            if reply.status == 416:
                raise CorruptError(f"{self}: blob {digest} is shorter than {start} bytes")
            skip = start if reply.status == 200 else 0
            if reply.status == 206:
                stated = _CONTENT_RANGE.fullmatch(reply.headers.get("Content-Range", ""))
                if stated is None or int(stated[1]) != start:
                    raise TransientError(f"{self}: blob {digest} came in another range; try again")
            if skip > _MAX_SKIP_BYTES:
                raise TransientError(
                    f"{self} ignores Range, so a file cannot be read from its middle; read it from "
                    "its start, or ask who runs the registry's cache or proxy"
                )
            yield _cut(chunks, skip, end - start)

    def put_blob(self, data: bytes, media_type: str, **annotations: str) -> Descriptor:
        """Upload a small blob, unless it is there."""
        blob = describe(data, media_type, **annotations)
        if not self.has_blob(blob):
            location = self.begin_upload()
            self.finish_upload(location, blob.digest, data)
        return blob

    def begin_upload(self) -> str:
        """Open an upload; returns where it takes bytes."""
        request = self._request("POST", "blobs/uploads/", f"upload to {self}", (202,), write=True)
        return self.location(self.transport.ask(request))

    def finish_upload(self, location: str, digest: str, data: bytes = b"") -> None:
        """Close an upload under its digest.

        Raises:
            CorruptError: The registry has other bytes.
        """
        self.transport.ask(
            Request(
                method="PUT",
                url=f"{location}{'&' if urlsplit(location).query else '?'}digest={digest}",
                scope=self.scope(write=True),
                doing=f"upload to {self}",
                expect=(200, 201, 202, 204),
                headers={"Content-Type": "application/octet-stream"},
                body=data,
            )
        )

    def cancel_upload(self, location: str) -> None:
        """Give an upload up, as far as the registry can; it expires anyway."""
        request = Request(
            method="DELETE",
            url=location,
            scope=self.scope(write=True),
            doing=f"cancel an upload to {self}",
            expect=(200, 202, 204, 404, 405, 416),
        )
        with contextlib.suppress(TransientError, NotFoundError, AccessError):
            self.transport.ask(request)

    def tags(self) -> list[str]:
        """All tags; empty if there is no such repository."""
        return self.pages(self._request("GET", "", f"list {self}", (200, 404)), "tags/list", "tags")

    def referrers(self, digest: str) -> tuple[Descriptor, ...] | None:
        """Manifests that have this one as their subject; None if the registry has no such API."""
        request = self._request("GET", f"referrers/{digest}", f"list {self}", (200, 404))
        found: list[Descriptor] = []
        for _ in range(_MAX_PAGES):
            reply = self.transport.ask(request, MAX_DOCUMENT_BYTES)
            kind = reply.headers.get("Content-Type", "").partition(";")[0]
            if reply.status == 404 or kind == "text/html":
                return None
            found += parse_index(reply.body, f"referrers of {self}@{digest}")
            if (url := next_page(reply)) is None:
                break
            request = self._request("GET", url, f"list {self}", (200,))
        return tuple(found)

    def pages(self, request: Request, path: str, key: str) -> list[str]:
        """Follow a paged listing of strings."""
        url = f"{request.url}{path}?n={_PAGE}"
        found: list[str] = []
        for _ in range(_MAX_PAGES):
            page = Request(**{**request.__dict__, "url": url})
            reply = self.transport.ask(page, MAX_DOCUMENT_BYTES)
            if reply.status == 404:
                break
            value: Any = parse_object(reply.body, url).get(key) or []
            if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
                raise CorruptError(f"{url} is no list of {key}")
            found += value
            if (following := next_page(reply)) is None:
                break
            url = following
        return found

    def location(self, reply: Reply) -> str:
        """Where an upload goes on: at the registry itself, never another host.

        Raises:
            AccessError: The reply does not say, or names another host.
        """
        target = reply.headers.get("Location")
        if not target:
            raise AccessError(f"{self} does not say where an upload goes; is it an OCI registry?")
        url = urljoin(reply.url, target)
        if not self.transport.is_own(url):
            host = urlsplit(url).netloc
            raise AccessError(
                f"{self} sends an upload to another host ({host!r}); nothing was sent"
            )
        return url

    def scope(self, *, write: bool, delete: bool = False) -> str:
        """What a token must allow."""
        actions = "delete" if delete else "pull,push" if write else "pull"
        return f"repository:{self.name}:{actions}"

    def _request(
        self,
        method: str,
        path: str,
        doing: str,
        expect: tuple[int, ...],
        *,
        write: bool = False,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
    ) -> Request:
        base = f"{self.transport.api}/v2/{self.name}/"
        return Request(
            method=method,
            url=path if "://" in path else base + path,
            scope=self.scope(write=write or method == "PUT", delete=method == "DELETE"),
            doing=doing,
            expect=expect,
            headers=headers or {},
            body=body,
        )


def next_page(reply: Reply) -> str | None:
    """URL of the page that follows; None if this is the last (RFC 8288)."""
    match = _LINK.search(reply.headers.get("Link", ""))
    return urljoin(reply.url, match[1]) if match else None


def _cut(chunks: Iterator[bytes], skip: int, size_bytes: int) -> Iterator[bytes]:
    """Without the first `skip` bytes, and at most `size_bytes` of what follows."""
    for chunk in chunks:
        if skip:
            skipped = min(skip, len(chunk))
            skip -= skipped
            chunk = chunk[skipped:]
        if chunk:
            yield chunk[:size_bytes]
            size_bytes -= min(size_bytes, len(chunk))
        if not size_bytes:
            return
