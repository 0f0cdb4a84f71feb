"""An OCI registry as a store: versions are images, statements their referrers, each with a tag.

Every document and every small blob is bounded in size and compared to its digest here. Files are
streamed unchecked; their reader knows what they must be. Calls are those of distribution-spec 1.1.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from pipeline.core.errors import AccessError, CorruptError, NotFoundError, TransientError
from pipeline.core.published import FileDigest
from pipeline.registry.reference import check_part
from pipeline.registry.store import (
    ENVELOPE,
    KINDS,
    MAX_ATTACHMENT_BYTES,
    MAX_MOVES,
    MAX_PER_KIND,
    MAX_SMALL_BYTES,
    Place,
    RawStatement,
    in_parallel,
    is_named_after,
    is_statement_name,
    limit_dated,
    limit_kinds,
    max_bytes,
    parse_identity,
    read_each,
)
from pipeline.registry.stores.oci import image
from pipeline.registry.stores.oci.address import (
    Address,
    move_tag,
    parse_move_tag,
    parse_statement_tag,
    parse_version_tag,
    statement_tag,
    version_tag,
)
from pipeline.registry.stores.oci.transport import HttpRequest, Reply, Transport
from pipeline.registry.stores.oci.urls import joined
from pipeline.registry.stores.transfer import listed, window

STATEMENT_TYPE = "application/vnd.enginesmith.statement.v1"
MOVE_TYPE = "application/vnd.enginesmith.move.v1"
IDENTITY_TYPE = "application/vnd.enginesmith.registry.v1"
NAME = "io.enginesmith.statement.name"
CONTENT = "content.json"
IDENTITY, IDENTITY_REPOSITORY = "identity", "registry"
_PAGE = 1000
_MAX_READS = 2 * len(KINDS) * MAX_PER_KIND
"""Referrers of one package that are read, where many have one name."""
_LONGEST_TAG, _LONGEST_REPOSITORY = 128, 255  # distribution-spec 1.1, "Pulling manifests"
_MAX_ARTIFACT_BYTES = 256 << 10
"""Of the manifest of a statement or a move, which holds its content: twice what they may have."""
_IMAGES_KEPT = 4  # with manifests that are as large as they may be, some 15 MB each
_LINK = re.compile(r'<([^>]*)>\s*;.*\brel="?next"?')
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(?:\d+|\*)")


@dataclass(frozen=True, kw_only=True)
class Repository:
    """One repository of a registry, to read: `engines/phi3`, or empty, which has a catalog only."""

    transport: Transport
    name: str

    def __str__(self) -> str:
        return f"{urlsplit(self.transport.api).netloc}/{self.name}"

    def manifest(self, reference: str, limit_bytes: int = image.MAX_DOCUMENT_BYTES) -> bytes | None:
        """The manifest or index with a tag or digest; None if there is none.

        CorruptError if it is longer, or has another digest than was asked or the server states.
        """
        origin = f"{self}:{reference}"
        accept = {"Accept": f"{image.MANIFEST_TYPE}, {image.INDEX_TYPE}"}
        more: Any = {"also": (404,), "headers": accept, "limit_bytes": limit_bytes}
        reply = self.ask("GET", f"manifests/{reference}", **more)
        if reply.status == 404:
            return None
        if reply.is_page:
            raise TransientError(f"{origin} is answered by a web page; is a proxy in the way?")
        found = image.digest_of(reply.body)
        stated = reply.headers.get("Docker-Content-Digest", found)
        wanted = reference if reference.startswith("sha256:") else found
        if not found == stated == wanted:
            said = f"wanted {wanted} and the registry says {stated[:80]!r}"
            raise CorruptError(f"{origin} has digest {found}, {said}")
        return reply.body

    def content(self, reference: str, file: str, limit_bytes: int = MAX_SMALL_BYTES) -> bytes:
        """A file of an artifact of any type; NotFoundError, or CorruptError if it has none."""
        document = self.manifest(reference, _MAX_ARTIFACT_BYTES)
        if document is None:
            raise NotFoundError(f"{self} has no {reference}")
        layers = image.parse(image.Manifest, document, f"{self}:{reference}").layers
        blob = next((one for one in layers if one.annotation(image.TITLE) == file), None)
        if blob is None:
            raise CorruptError(f"{self}:{reference} has no {file}; remove it")
        return self.blob(blob, limit_bytes)

    def blob(self, blob: image.Descriptor, limit_bytes: int) -> bytes:
        """A small blob; NotFoundError, or CorruptError if it is another or too large."""
        if blob.size > limit_bytes:
            raise CorruptError(f"{self}: a blob of {blob.size} bytes; at most {limit_bytes} count")
        if blob.data is None:
            data = self.ask("GET", f"blobs/{blob.digest}", limit_bytes=blob.size).body
        else:
            try:
                data = base64.b64decode(blob.data, validate=True)
            except ValueError as error:
                raise CorruptError(f"{self}: blob {blob.digest} is not base64") from error
        found = image.digest_of(data)
        if found != blob.digest:
            raise CorruptError(f"{self}: blob {blob.digest} has digest {found}")
        return data

    @contextlib.contextmanager
    def open_blob(self, digest: str, start: int, end: int) -> Iterator[Iterator[bytes]]:
        """The bytes of a blob from `start` up to and without `end`, unchecked, in chunks.

        NotFoundError, or CorruptError if it is shorter than `start`.
        """
        span = {"Range": f"bytes={start}-{end - 1}"}
        request = HttpRequest("GET", self.name, f"blobs/{digest}", also=(416,), headers=span)
        with self.transport.open(request) as (reply, chunks):
            if reply.status == 416:
                raise CorruptError(f"{self}: blob {digest} is shorter than {start} bytes")
            if reply.status == 206:
                stated = _CONTENT_RANGE.fullmatch(reply.headers.get("Content-Range", ""))
                if stated is None or int(stated[1]) != start:
                    raise TransientError(f"{self}: blob {digest} came in another range; try again")
            yield window(chunks, start if reply.status == 200 else 0, end - start, str(self))

    def tags(self, count: Iterator[int] | None = None) -> list[str]:
        """All tags; empty if there is no such repository. Lists with one `count` share a bound."""
        replies = self._pages(f"tags/list?n={_PAGE}", also=(404,))
        found = listed(replies, lambda reply: _listing(reply).tags, str(self), count)
        return [tag for tag in found if len(tag) <= _LONGEST_TAG]

    def catalog(self) -> list[str]:
        replies = self._pages(f"_catalog?n={_PAGE}")
        found = listed(replies, lambda reply: _listing(reply).repositories, str(self))
        return [name for name in found if len(name) <= _LONGEST_REPOSITORY]

    def referrers(self, digest: str) -> Iterator[image.Descriptor] | None:
        """Manifests that have this one as their subject; None if the registry has no such API."""
        replies = self._pages(f"referrers/{digest}", also=(404,))
        first = next(replies, None)
        if first is None or first.is_page:
            return None
        replies = itertools.chain([first], replies)
        return listed(replies, lambda reply: _listing(reply).manifests, str(self))

    def ask(
        self, method: str, path: str, *, limit_bytes: int = image.MAX_DOCUMENT_BYTES, **more: Any
    ) -> Reply:
        return self.transport.ask(HttpRequest(method, self.name, path, **more), limit_bytes)

    def _pages(self, path: str, also: tuple[int, ...] = ()) -> Iterator[Reply]:
        """The pages of a list, none if it answers 404."""
        while True:
            reply = self.ask("GET", path, also=also)
            if reply.status == 404:
                return
            yield reply
            following = _LINK.search(reply.headers.get("Link", ""))  # RFC 8288
            if following is None:
                return
            path = joined(reply.url, following[1])


def _listing(reply: Reply) -> image.Listing:
    return image.parse(image.Listing, reply.body, reply.url)


@dataclass(frozen=True, kw_only=True)
class OciStore:
    """`pipeline.registry.store.Store`, in an OCI registry."""

    url: str
    public: bool
    address: Address
    transport: Transport
    _images: dict[Place, image.Image] = field(default_factory=dict)
    """Of versions that were read: a version never changes, and a pull asks for many pieces."""

    @property
    def local(self) -> bool:
        return False

    def identity(self) -> str | None:
        repository = self.repository(IDENTITY_REPOSITORY)
        if repository.manifest(IDENTITY) is None:
            return None
        data = repository.content(IDENTITY, CONTENT)
        return parse_identity(data, f"{repository}:{IDENTITY}")

    def places(self, name: str | None = None, variant: str | None = None) -> list[Place]:
        tags = self.tags_of(name).items()
        found = (parse_version_tag(one, tag) for one, of_one in tags for tag in of_one)
        return sorted(place for place in found if place and variant in {None, place.variant})

    def read_manifest(self, place: Place) -> bytes:
        return self.image(place).manifest

    @contextlib.contextmanager
    def open_file(
        self, place: Place, file: FileDigest, offset: int = 0, end: int | None = None
    ) -> Iterator[Iterator[bytes]]:
        digest, start = self.image(place).find(file.path)
        stop = file.size_bytes if end is None else min(end, file.size_bytes)
        if offset >= stop:
            yield iter(())
            return
        repository = self.repository(place.name)
        with repository.open_blob(digest, start + offset, start + stop) as chunks:
            yield chunks

    def read_statements(
        self, place: Place, names: Collection[str] | None = None
    ) -> list[RawStatement]:
        what, repository = f"{self.url}: statements of {place}", self.repository(place.name)
        by_tag = {name: [statement_tag(place, name)] for name in names or ()}
        found = self.statement_references(place) if names is None else by_tag
        if names is None:
            yanks = sum(name.startswith("yank-") for name in found)
            if yanks > MAX_PER_KIND:  # undated: nothing tells which of them to read
                fault = (
                    f"{yanks} yanks, {MAX_PER_KIND} are read at most, so a true one may be missed"
                )
                raise CorruptError(f"{what}: {fault}, so remove those that are not yours")
            names = limit_kinds([(0.0, name) for name in found], what)
        reads = itertools.count(1)

        def read(name: str) -> bytes | None:
            for reference in found.get(name, ()):
                if next(reads) > _MAX_READS:
                    break
                with contextlib.suppress(CorruptError, NotFoundError):
                    data = repository.content(reference, ENVELOPE, max_bytes(name))
                    if is_named_after(name, data):
                        return data
            return None

        read_all = read_each(read, names, what)
        # Who may push can move a tag, but not take an entry from the registry's own list.
        if found is by_tag and len(read_all) < len(names):
            found = self.statement_references(place)
            read_all |= read_each(read, [name for name in names if name not in read_all], what)
        return [RawStatement(name=name, files={ENVELOPE: data}) for name, data in read_all.items()]

    def read_attachments(
        self, place: Place, name: str, files: Mapping[str, str]
    ) -> dict[str, bytes]:
        repository, most, found = self.repository(place.name), MAX_ATTACHMENT_BYTES, {}
        for file, sha256 in files.items():
            blob = image.Descriptor(media_type="", digest=f"sha256:{sha256}", size=most)
            with contextlib.suppress(NotFoundError):
                found[file] = repository.blob(blob, most)
        return found

    def read_moves(
        self, name: str, variant: str, names: Collection[str] | None = None
    ) -> list[bytes]:
        repository, what = self.repository(name), f"{self.url}: moves of {name}/{variant}"
        if names is None:
            moves = filter(None, map(parse_move_tag, repository.tags()))
            dated = [(0.0, move) for of, move in moves if of == variant]
            names = limit_dated(dated, MAX_MOVES, what)

        def read(move: str) -> bytes:
            return repository.content(move_tag(variant, move), CONTENT)

        return list(read_each(read, names, what).values())

    def repository(self, name: str) -> Repository:
        return Repository(transport=self.transport, name=self.address.repository(name))

    def image(self, place: Place) -> image.Image:
        """The image of a version; NotFoundError, or CorruptError if it is no package."""
        if (found := self._images.get(place)) is None:
            repository, tag = self.repository(place.name), version_tag(place)
            if (document := repository.manifest(tag)) is None:
                raise NotFoundError(f"{self.url} has no {place}")
            found = image.parse_image(document, f"{repository}:{tag}")
            for other in list(self._images)[: 1 - _IMAGES_KEPT]:
                self._images.pop(other, None)
            self._images[place] = found
        return found

    def statement_references(self, place: Place) -> dict[str, list[str]]:
        """Name of a statement -> what it can be read by, its own tag first."""
        if (native := self._referrers(place)) is None:
            tags = map(parse_statement_tag, self.repository(place.name).tags())
            of_place = statement_tag(place, "").removeprefix("_")
            native = {name: [] for name, of in filter(None, tags) if of == of_place}
        return {name: [statement_tag(place, name), *digests] for name, digests in native.items()}

    def tags_of(self, name: str | None) -> dict[str, list[str]]:
        """The tags of every recipe, or of one."""
        if name is not None:
            names = [check_part("name", name)]
        else:
            try:
                listed = Repository(transport=self.transport, name="").catalog()
            except (NotFoundError, AccessError) as error:
                advice = "Many registries do not list what they have: name the package"
                raise AccessError(f"{error}. {advice}") from error
            names = [own for one in listed if (own := self.address.name_of(one))]
        count = itertools.count(1)
        read = in_parallel(lambda one: self.repository(one).tags(count), names)
        return dict(zip(names, read, strict=True))

    def _referrers(self, place: Place) -> dict[str, list[str]] | None:
        """Statement -> digests, as the registry itself lists them; None if it has no such list.

        Who may push can give many manifests one name, and not take an entry from this list.
        """
        try:
            subject = image.digest_of(self.image(place).document)
        except (CorruptError, NotFoundError):  # its reader hears of it
            return {}
        found = self.repository(place.name).referrers(subject)
        if found is None:
            return None
        names: dict[str, list[str]] = {}
        for one in found:
            name = one.annotation(NAME)
            if one.artifact_type in {None, "", STATEMENT_TYPE} and is_statement_name(name):
                names.setdefault(name, []).append(one.digest)
        return names
