"""Stream a large blob into a registry, in bounded memory, hashed as it goes out.

Its digest is known when its last byte has gone; the distribution API asks for it only then. The
bytes go in parts (chunked upload), since many registries and proxies refuse one request of several
gigabytes. After a fault the upload goes on from where the registry says that it stopped; where the
registry cannot say (docker-registry 2.8 drops an upload whose part broke off, tried 2026-11-25),
it starts again.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pipeline.core.errors import CorruptError, NotFoundError, PipelineError
from pipeline.registry.stores.oci.distribution import Repository
from pipeline.registry.stores.oci.documents import Descriptor
from pipeline.registry.stores.oci.transport import ATTEMPTS, Request, RetryableError, pause

log = logging.getLogger(__name__)

PART_BYTES = 64 << 20
_RANGE = re.compile(r"(?:bytes=)?0-(\d+)")


def upload_stream(
    repository: Repository,
    size_bytes: int,
    content: Callable[[], Iterator[bytes]],
    on_position: Callable[[int], None],
) -> str:
    """Upload a blob.

    Args:
        repository: Where to.
        size_bytes: Of the blob.
        content: Begins its bytes anew; called again after a fault. An exception from it cancels
            the upload.
        on_position: Called with how much has gone out; may step back after a fault.

    Returns:
        The digest of what was sent.

    Raises:
        CorruptError: The registry got other bytes.
        TransientError: It broke `ATTEMPTS` times without getting any further.
    """
    failures, furthest = 0, -1
    location, offset = repository.begin_upload(), 0
    while True:
        sender = _Sender(repository=repository, size_bytes=size_bytes, location=location)
        try:
            return sender.send(content(), offset, on_position)
        except RetryableError as error:
            failures = 1 if sender.offset > furthest else failures + 1
            furthest = max(furthest, sender.offset)
            if failures >= ATTEMPTS:
                repository.cancel_upload(sender.location)
                raise
            pause(failures, error)
        except BaseException:
            with contextlib.suppress(PipelineError):
                repository.cancel_upload(sender.location)
            raise
        location, offset = _resume(repository, sender.location)


@dataclass(kw_only=True)
class _Sender:
    """One try.

    Attributes:
        location: Where the next part goes.
        offset: How much the registry has acknowledged.
    """

    repository: Repository
    size_bytes: int
    location: str
    offset: int = 0
    _digest: Any = field(default_factory=hashlib.sha256)

    def send(
        self, content: Iterator[bytes], offset: int, on_position: Callable[[int], None]
    ) -> str:
        """Send everything from `offset` on; what precedes it is hashed only."""
        self.offset = offset
        chunks = _Chunks(content)
        for chunk in chunks.take(offset):
            self._digest.update(chunk)
        while self.offset < self.size_bytes:
            part_bytes = min(PART_BYTES, self.size_bytes - self.offset)
            self._send_part(chunks.take(part_bytes), part_bytes, on_position)
        if any(chunks.take(1)):
            raise CorruptError("a file grew while it was uploaded; build the package again")
        digest = f"sha256:{self._digest.hexdigest()}"
        try:
            self.repository.finish_upload(self.location, digest)
        except NotFoundError as error:
            blob = Descriptor(media_type="", digest=digest, size_bytes=self.size_bytes)
            if not self.repository.has_blob(blob):  # else only the reply was lost
                raise RetryableError(f"{self.repository} forgot an upload: {error}") from error
        return digest

    def _send_part(
        self, chunks: Iterator[bytes], part_bytes: int, on_position: Callable[[int], None]
    ) -> None:
        start = self.offset

        def body() -> Iterator[bytes]:
            sent = start
            for chunk in chunks:
                self._digest.update(chunk)
                yield chunk
                sent += len(chunk)
                on_position(sent)

        reply = self.repository.transport.ask_once(
            Request(
                method="PATCH",
                url=self.location,
                scope=self.repository.scope(write=True),
                doing=f"upload to {self.repository}",
                expect=(202, 204, 404, 416),
                headers={
                    "Content-Type": "application/octet-stream",
                    "Content-Length": str(part_bytes),
                    "Content-Range": f"{start}-{start + part_bytes - 1}",
                },
                body=body(),
            )
        )
        if reply.status in {404, 416}:
            raise RetryableError(f"{self.repository} lost an upload ({reply.status})")
        self.location = self.repository.location(reply)
        self.offset = start + part_bytes


def _resume(repository: Repository, location: str) -> tuple[str, int]:
    """Where an upload that broke off goes on; a new one if the registry does not know it."""
    request = Request(
        method="GET",
        url=location,
        scope=repository.scope(write=True),
        doing=f"resume an upload to {repository}",
        expect=(200, 202, 204, 400, 404, 416),
    )
    reply = repository.transport.ask(request)
    found = _RANGE.fullmatch(reply.headers.get("Range", ""))
    if reply.status == 204 and found and reply.headers.get("Location"):
        # An empty upload is said to have the range 0-0, as one of one byte has: take it as empty.
        offset = int(found[1]) + 1 if int(found[1]) else 0
        log.info("The upload to %s goes on from byte %d", repository, offset)
        return repository.location(reply), offset
    return repository.begin_upload(), 0


class _Chunks:
    """Hands out exact numbers of bytes of an iterator of chunks."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = b""

    def take(self, size_bytes: int) -> Iterator[bytes]:
        """The next `size_bytes`, fewer only at the end."""
        while size_bytes:
            if not self._rest:
                chunk = next(self._chunks, None)
                if chunk is None:
                    return
                self._rest = chunk
            part = self._rest[:size_bytes]  # a whole chunk is not copied
            self._rest = self._rest[len(part) :]
            size_bytes -= len(part)
            if part:
                yield part
