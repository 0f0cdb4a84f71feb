"""Send a layer into a registry, in bounded memory.

The bytes go in parts (chunked upload), since many registries and proxies refuse one request of
several gigabytes. A part that failed is repeated by urllib3; where the registry has lost its place,
the upload goes on from where the registry says that it stopped, and where it cannot say
(docker-registry 2.8 drops an upload whose part broke off, tried 2026-11-25), it starts again.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections.abc import Callable

from pipeline.core.errors import NotFoundError, PipelineError, TransientError
from pipeline.registry.stores.oci.content import LayerReader
from pipeline.registry.stores.oci.distribution import Repository
from pipeline.registry.stores.oci.documents import Descriptor
from pipeline.registry.stores.oci.transport import Request
from pipeline.registry.stores.transfer import ATTEMPTS

log = logging.getLogger(__name__)

PART_BYTES = 64 << 20
_RANGE = re.compile(r"(?:bytes=)?0-(\d+)")


def upload(
    repository: Repository,
    blob: Descriptor,
    reader: LayerReader,
    on_position: Callable[[int], None],
) -> None:
    """Upload a blob.

    Args:
        repository: Where to.
        blob: What it is.
        reader: Its bytes.
        on_position: Called with how much has gone out; may step back after a fault.

    Raises:
        CorruptError: The registry got other bytes.
        TransientError: It broke `ATTEMPTS` times without getting any further.
    """
    failures, furthest = 0, 0
    location, offset = repository.begin_upload(), 0
    while True:
        try:
            while offset < blob.size_bytes:
                location, offset = _send_part(repository, location, offset, reader)
                on_position(offset)
            repository.finish_upload(location, blob.digest)
            return
        except (TransientError, NotFoundError):
            failures = 1 if offset > furthest else failures + 1
            furthest = max(furthest, offset)
            if failures >= ATTEMPTS:
                raise
        except BaseException:
            with contextlib.suppress(PipelineError):
                repository.cancel_upload(location)
            raise
        if repository.has_blob(blob):  # only the reply was lost
            return
        location, offset = _resume(repository, location)


def _send_part(
    repository: Repository, location: str, offset: int, reader: LayerReader
) -> tuple[str, int]:
    """Send the next part; where the one after it goes, and its offset."""
    end = min(offset + PART_BYTES, reader.size_bytes)
    reply = repository.transport.ask(
        Request(
            method="PATCH",
            url=location,
            scope=repository.scope(write=True),
            doing=f"upload to {repository}",
            expect=(202, 204, 404, 416),
            headers={
                "Content-Type": "application/octet-stream",
                "Content-Length": str(end - offset),
                "Content-Range": f"{offset}-{end - 1}",
            },
            body=_Part(reader, offset, end),
        )
    )
    if reply.status in {404, 416}:
        raise TransientError(f"{repository} lost an upload ({reply.status}); try again")
    return repository.location(reply), end


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


class _Part(io.RawIOBase):
    """A piece of a layer as a file: what urllib3 sends, and rewinds to send again."""

    def __init__(self, reader: LayerReader, start: int, end: int) -> None:
        self._reader, self._start, self._end = reader, start, end
        reader.seek(start)

    def read(self, count: int = -1) -> bytes:
        left = self._end - self._reader.tell()
        return self._reader.read(left if count < 0 else min(count, left)) if left > 0 else b""

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._reader.seek(self._start + offset) - self._start

    def tell(self) -> int:
        return self._reader.tell() - self._start
