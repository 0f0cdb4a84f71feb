"""The distribution API of one repository (distribution-spec 1.1): manifests, blobs, tags.

Every document and every small blob is bounded in size and compared to its digest here. Large blobs
are streamed unchecked; their reader knows what they must be.

A large blob goes out in parts (chunked upload), in bounded memory, since many registries and
proxies refuse one request of several gigabytes. A part that failed is repeated by urllib3. Where
the registry has lost its place (docker-registry 2.8 drops an upload whose part broke off, tried
2026-11-25), the blob starts anew.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

from pipeline.core.errors import (
    AccessError,
    CorruptError,
    NotFoundError,
    PipelineError,
    TransientError,
)
from pipeline.registry.stores.oci.documents import (
    INDEX_TYPE,
    MANIFEST_TYPE,
    Descriptor,
    Listing,
    describe,
    digest_of,
    parse,
)
from pipeline.registry.stores.oci.transport import Reply, Request, Transport
from pipeline.registry.stores.transfer import ATTEMPTS

log = logging.getLogger(__name__)

PART_BYTES = 32 << 20
"""Of an upload: what is in memory at a time, twice."""
_MAX_SKIP_BYTES = 64 << 20
"""What is read and thrown away where a server ignores `Range`."""
_MAX_PAGES = 3_000
"""Three million names; a server that lists more is not a registry, or never ends."""
_PAGE = 1000
_LINK = re.compile(r'<([^>]*)>\s*;.*\brel="?next"?')
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(?:\d+|\*)")
_BINARY = {"Content-Type": "application/octet-stream"}


@dataclass(frozen=True, kw_only=True)
class Repository:
    """One repository of a registry.

    Attributes:
        transport: The way there.
        name: Such as `engines/phi3`; empty for the registry itself, which has a catalog only.
    """

    transport: Transport
    name: str

    def __str__(self) -> str:
        return f"{urlsplit(self.transport.api).netloc}/{self.name}"

    def manifest(self, reference: str) -> bytes | None:
        """The manifest or index with a tag or digest; None if there is none.

        Raises:
            CorruptError: Its bytes have not the digest that was asked, or that the server states.
        """
        origin = f"{self}:{reference}"
        accept = {"Accept": f"{MANIFEST_TYPE}, {INDEX_TYPE}"}
        reply = self.transport.ask(
            self._request("GET", f"manifests/{reference}", also=(404,), headers=accept)
        )
        if reply.status == 404:
            return None
        if reply.media_type == "text/html":
            raise TransientError(f"{origin} is answered by a web page; is a proxy in the way?")
        found = digest_of(reply.body)
        stated = reply.headers.get("Docker-Content-Digest", found)
        wanted = reference if reference.startswith("sha256:") else found
        if not found == stated == wanted:
            raise CorruptError(
                f"{origin} has digest {found}, wanted {wanted} and the registry says "
                f"{stated[:80]!r}"
            )
        return reply.body

    def put_manifest(self, reference: str, document: bytes) -> None:
        """Write a manifest under a tag or its digest; what the tag named is replaced."""
        path, kind = f"manifests/{reference}", {"Content-Type": MANIFEST_TYPE}
        for attempt in range(1, ATTEMPTS):
            with contextlib.suppress(TransientError):  # a blob that was uploaded is not seen yet
                self.transport.ask(self._request("PUT", path, headers=kind, body=document))
                return
            time.sleep(0.1 * 2**attempt * random.uniform(0.5, 1.0))
        self.transport.ask(self._request("PUT", path, headers=kind, body=document))

    def delete_manifest(self, digest: str) -> None:
        """Remove a manifest and its tags, if it is there.

        Raises:
            AccessError: The registry is not set to delete.
        """
        self.transport.ask(self._request("DELETE", f"manifests/{digest}", also=(404,)))

    def has_blob(self, blob: Descriptor) -> bool:
        """Whether a blob of this digest and size is there."""
        reply = self.transport.ask(
            self._request("HEAD", f"blobs/{blob.digest}", also=(404,), push=True)
        )
        return reply.status == 200 and reply.headers.get("Content-Length") == str(blob.size)

    def blob(self, blob: Descriptor, limit_bytes: int) -> bytes:
        """A small blob, checked.

        Raises:
            NotFoundError: It is not there.
            CorruptError: It has other bytes, or more than `limit_bytes`.
        """
        if blob.size > limit_bytes:
            raise CorruptError(
                f"{self}: a blob of {blob.size} bytes; at most {limit_bytes} are read"
            )
        if blob.data is not None:
            try:
                data = base64.b64decode(blob.data, validate=True)
            except ValueError as error:
                raise CorruptError(f"{self}: blob {blob.digest} is not base64") from error
        else:
            path = f"blobs/{blob.digest}"
            data = self.transport.ask(self._request("GET", path), blob.size).body
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
        span = {"Range": f"bytes={start}-{end - 1}"}
        request = self._request("GET", f"blobs/{digest}", also=(416,), headers=span)
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

    def put_blob(
        self, data: bytes, media_type: str, title: str | None = None, *, inline: bool = False
    ) -> Descriptor:
        """Upload a small blob, unless it is there; see `describe`."""
        blob = describe(data, media_type, title, inline=inline)
        if not self.has_blob(blob):
            self._finish_upload(self._begin_upload(), blob.digest, data)
        return blob

    def upload(
        self,
        blob: Descriptor,
        content: Callable[[], Iterator[bytes]],
        on_position: Callable[[int], None],
    ) -> None:
        """Upload a large blob.

        Args:
            blob: What it is.
            content: Begins its bytes anew; called again after a fault.
            on_position: Called with how much has gone out; steps back after a fault.

        Raises:
            CorruptError: The registry got other bytes.
            TransientError: It broke `ATTEMPTS` times.
        """
        for attempt in range(1, ATTEMPTS + 1):
            location = self._begin_upload()
            try:
                offset = 0
                for part in _parts(content()):
                    location = self._send_part(location, offset, part)
                    offset += len(part)
                    on_position(offset)
                self._finish_upload(location, blob.digest)
                return
            except (TransientError, NotFoundError) as error:
                if self.has_blob(blob):  # only the reply was lost
                    return
                if attempt == ATTEMPTS:
                    raise
                log.info("Sending %s to %s again: %s", blob.digest, self, error)
            except BaseException:
                with contextlib.suppress(PipelineError):
                    self._cancel_upload(location)
                raise

    def check_upload(self) -> None:
        """Begin an upload and give it up.

        Raises:
            AccessError: Not allowed.
            NotFoundError: The registry wants repositories to be made beforehand.
        """
        location = self._begin_upload()
        with contextlib.suppress(TransientError, NotFoundError, AccessError):
            self._cancel_upload(location)

    def tags(self) -> list[str]:
        """All tags; empty if there is no such repository."""
        replies = self._pages(f"tags/list?n={_PAGE}", also=(404,))
        return [tag for reply in replies for tag in _listing(reply).tags or ()]

    def catalog(self) -> list[str]:
        """All repositories of the registry.

        Raises:
            AccessError: It does not list them.
        """
        replies = self._pages(f"_catalog?n={_PAGE}")
        return [name for reply in replies for name in _listing(reply).repositories or ()]

    def referrers(self, digest: str) -> tuple[Descriptor, ...] | None:
        """Manifests that have this one as their subject; None if the registry has no such API."""
        found: tuple[Descriptor, ...] | None = None
        for reply in self._pages(f"referrers/{digest}", also=(404,)):
            if reply.media_type == "text/html":
                return None
            found = (*(found or ()), *(_listing(reply).manifests or ()))
        return found

    def _pages(self, path: str, also: tuple[int, ...] = ()) -> Iterator[Reply]:
        """The pages of a list, none if it answers 404."""
        for _ in range(_MAX_PAGES):
            reply = self.transport.ask(self._request("GET", path, also=also))
            if reply.status == 404:
                return
            yield reply
            following = _LINK.search(reply.headers.get("Link", ""))  # RFC 8288
            if following is None:
                return
            path = urljoin(reply.url, following[1])

    def _begin_upload(self) -> str:
        """Open an upload; returns where it takes bytes."""
        return self._location(self.transport.ask(self._request("POST", "blobs/uploads/")))

    def _send_part(self, location: str, offset: int, part: bytes) -> str:
        """Send the next part; where the one after it goes."""
        span = {"Content-Range": f"{offset}-{offset + len(part) - 1}"}
        reply = self.transport.ask(
            self._request("PATCH", location, also=(404, 416), headers=_BINARY | span, body=part)
        )
        if reply.status in {404, 416}:
            raise TransientError(f"{self} lost an upload ({reply.status}); try again")
        return self._location(reply)

    def _finish_upload(self, location: str, digest: str, data: bytes = b"") -> None:
        """Close an upload under its digest.

        Raises:
            CorruptError: The registry has other bytes.
        """
        url = f"{location}{'&' if urlsplit(location).query else '?'}digest={digest}"
        self.transport.ask(self._request("PUT", url, headers=_BINARY, body=data))

    def _cancel_upload(self, location: str) -> None:
        """Give an upload up, as far as the registry can; it expires anyway."""
        self.transport.ask(self._request("DELETE", location, also=(404, 405, 416), push=True))

    def _location(self, reply: Reply) -> str:
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

    def _request(
        self,
        method: str,
        path: str,
        *,
        also: tuple[int, ...] = (),
        push: bool = False,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
    ) -> Request:
        """A request.

        Args:
            method: HTTP method.
            path: Below the repository, or a URL.
            also: Statuses that are answers, too.
            push: It is a part of pushing, whatever its method.
            headers: Besides ours.
            body: What to send.
        """
        base = f"{self.transport.api}/v2/{self.name}/" if self.name else f"{self.transport.api}/v2/"
        pushes = push or method in {"PUT", "POST", "PATCH"}
        actions = "pull,push" if pushes else "delete" if method == "DELETE" else "pull"
        doing = {"pull,push": "upload to", "delete": "delete from", "pull": "read from"}[actions]
        return Request(
            method=method,
            url=path if "://" in path else base + path,
            scope=f"repository:{self.name}:{actions}" if self.name else "registry:catalog:*",
            doing=f"{doing} {self}",
            also=also,
            headers=headers or {},
            body=body,
        )


def _listing(reply: Reply) -> Listing:
    return parse(Listing, reply.body, reply.url)


def _parts(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes in parts of `PART_BYTES`; the last one may be shorter."""
    held = bytearray()
    for chunk in chunks:
        held += chunk
        while len(held) >= PART_BYTES:
            yield bytes(held[:PART_BYTES])
            del held[:PART_BYTES]
    if held:
        yield bytes(held)


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
