"""Send a layer into a registry, in bounded memory.

The bytes go in parts (chunked upload), since many registries and proxies refuse one request of
several gigabytes. A part that failed is repeated by urllib3. Where the registry has lost its place
(docker-registry 2.8 drops an upload whose part broke off, tried 2026-11-25), the layer starts anew.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

from pipeline.core.errors import NotFoundError, PipelineError, TransientError
from pipeline.registry.stores.oci.distribution import Repository
from pipeline.registry.stores.oci.documents import Descriptor
from pipeline.registry.stores.oci.transport import Request
from pipeline.registry.stores.transfer import ATTEMPTS

log = logging.getLogger(__name__)

PART_BYTES = 32 << 20
"""What is in memory at a time, twice."""


def upload(
    repository: Repository,
    blob: Descriptor,
    content: Callable[[], Iterator[bytes]],
    on_position: Callable[[int], None],
) -> None:
    """Upload a blob.

    Args:
        repository: Where to.
        blob: What it is.
        content: Begins its bytes anew; called again after a fault.
        on_position: Called with how much has gone out; steps back after a fault.

    Raises:
        CorruptError: The registry got other bytes.
        TransientError: It broke `ATTEMPTS` times.
    """
    for attempt in range(1, ATTEMPTS + 1):
        location = repository.begin_upload()
        try:
            offset = 0
            for part in _parts(content()):
                location = _send_part(repository, location, offset, part)
                offset += len(part)
                on_position(offset)
            repository.finish_upload(location, blob.digest)
            return
        except (TransientError, NotFoundError) as error:
            if repository.has_blob(blob):  # only the reply was lost
                return
            if attempt == ATTEMPTS:
                raise
            log.info("Sending %s to %s again: %s", blob.digest, repository, error)
        except BaseException:
            with contextlib.suppress(PipelineError):
                repository.cancel_upload(location)
            raise


def _send_part(repository: Repository, location: str, offset: int, part: bytes) -> str:
    """Send the next part; where the one after it goes."""
    reply = repository.transport.ask(
        Request(
            method="PATCH",
            url=location,
            scope=repository.scope(write=True),
            doing=f"upload to {repository}",
            expect=(202, 204, 404, 416),
            headers={
                "Content-Type": "application/octet-stream",
                "Content-Range": f"{offset}-{offset + len(part) - 1}",
            },
            body=part,
        )
    )
    if reply.status in {404, 416}:
        raise TransientError(f"{repository} lost an upload ({reply.status}); try again")
    return repository.location(reply)


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
