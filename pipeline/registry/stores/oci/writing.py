"""Publishing to an OCI registry.

A version is there as soon as its tag is, and not before: layers, config, the image manifest under
its digest, statements, sizes asked back, then the tag. Blobs have the name of their digest, so what
is there is right. Tags have no exclusive creation, but a name that follows from its content needs
none: who may push may overwrite, and readers find that out.

A large blob goes out in parts (chunked upload), in bounded memory, since many registries and
proxies refuse one request of several gigabytes. A part that failed is repeated by urllib3. Where
the registry has lost its place (docker-registry 2.8 drops an upload whose part broke off, tried
2026-11-25), the blob starts anew.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import rfc8785

from pipeline.core import errors
from pipeline.core.errors import AccessError, CorruptError, NotFoundError, TransientError
from pipeline.core.published import Package
from pipeline.registry.manifest import MANIFEST, files_of
from pipeline.registry.reference import check_part
from pipeline.registry.store import ENVELOPE, OnBytes, Place, RawStatement
from pipeline.registry.stores import transfer
from pipeline.registry.stores.oci import image, reading
from pipeline.registry.stores.oci.address import (
    copies_tag,
    move_tag,
    parse_move_tag,
    parse_statement_tag,
    parse_version_tag,
    statement_tag,
    version_tag,
)
from pipeline.registry.stores.oci.image import Descriptor, Layer, digest_of
from pipeline.registry.stores.oci.reading import CONTENT, OciStore, Repository
from pipeline.registry.stores.oci.transport import Reply
from pipeline.registry.stores.oci.urls import joined
from pipeline.registry.stores.publication import (
    Listed,
    add_copies,
    check_statement,
    checked_chunks,
    copy_of,
    list_variants,
    new_identity,
    sealed_manifest,
)

log = logging.getLogger(__name__)

PART_BYTES = 32 << 20
"""Of an upload: what is in memory at a time, twice."""
SETTLE_S = 1.0
"""After it, what others began to write under a tag that they saw free has arrived."""
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"
_EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
_COPIES_TYPE = "application/vnd.enginesmith.copies.v1"
_COPIES = "io.enginesmith.copies"
_BINARY = {"Content-Type": "application/octet-stream"}
_EPOCH = "1970-01-01T00:00:00Z"
_MAX_TAG = 128
"""Characters (distribution-spec 1.1, "Pulling manifests")."""


def tar_of(layer: Layer, package_dir: Path, manifest: bytes) -> Iterator[bytes]:
    """A layer's tar, in chunks; CorruptError if a file is not what the manifest says."""
    for member in layer.members:
        yield member.header
        if member.file.path == MANIFEST:
            yield manifest
        else:
            yield from checked_chunks(package_dir / member.file.path, member.file)
        yield bytes(member.padding)
    yield image.END


def describe(
    data: bytes, media_type: str, title: str | None = None, *, inline: bool = False
) -> Descriptor:
    """Name bytes that we hold, and the file that they are in an artifact.

    Inline, they travel in the descriptor, so that reading them needs no further request (image-spec
    1.1, "Embedded Content").
    """
    return Descriptor(
        media_type=media_type,
        digest=digest_of(data),
        size=len(data),
        annotations=None if title is None else {image.TITLE: title},
        data=base64.b64encode(data).decode() if inline else None,
    )


def document_of(**fields: Any) -> bytes:
    """The bytes of a manifest with the fields of `image.Manifest`; the same for the same fields."""
    value = image.Manifest(**fields).model_dump(by_alias=True, exclude_none=True)
    return rfc8785.dumps({"schemaVersion": 2, "mediaType": image.MANIFEST_TYPE, **value})


def image_config(layers: Sequence[Descriptor]) -> bytes:
    """The image config; uncompressed layers, so their digests are the diff ids.

    `architecture` is that of every card that we know; runtimes refuse to mount an image that is
    for another one, whatever it holds.
    """
    return rfc8785.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "created": _EPOCH,
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": [layer.digest for layer in layers]},
            "history": [{"created": _EPOCH, "created_by": "enginesmith"} for _ in layers],
        }
    )


def make_image(place: Place, manifest: bytes, config: bytes, layers: Sequence[Descriptor]) -> bytes:
    """The image manifest; PipelineError if it lists more files than an image can."""
    document = document_of(
        artifact_type=image.ARTIFACT_TYPE,
        config=describe(config, CONFIG_TYPE),
        layers=tuple(layers),
        annotations={
            image.TITLE: str(place),
            "org.opencontainers.image.created": _EPOCH,
            image.PACKAGE_MANIFEST: manifest.decode(),
        },
    )
    if len(document) > image.MAX_DOCUMENT_BYTES:
        raise errors.PipelineError(
            f"{place} has too many files for an OCI registry, whose manifests have at most "
            f"{image.MAX_DOCUMENT_BYTES} bytes; publish it to a folder or to S3"
        )
    return document


def channel_tag(variant: str, channel: str, card: str) -> str:
    """The tag of the image that a channel means: `<variant>_<channel>.<card>`.

    Where that is too long, the first 16 digits of the card's SHA-256 stand for the card.
    """
    start = f"{check_part('variant', variant)}_{check_part('channel', channel)}."
    tag = start + check_part("card", card)
    return tag if len(tag) <= _MAX_TAG else start + hashlib.sha256(card.encode()).hexdigest()[:16]


class WritableRepository(Repository):
    """One repository of a registry, to write."""

    def put_manifest(self, reference: str, document: bytes) -> None:
        """Write a manifest under a tag or its digest; what the tag named is replaced."""
        kind = {"Content-Type": image.MANIFEST_TYPE}
        self.ask("PUT", f"manifests/{reference}", headers=kind, body=document)

    def delete_manifest(self, digest: str) -> None:
        self.ask("DELETE", f"manifests/{digest}", also=(404,))

    def has_blob(self, blob: Descriptor) -> bool:
        reply = self.ask("HEAD", f"blobs/{blob.digest}", also=(404,), push=True)
        return reply.status == 200 and reply.headers.get("Content-Length") == str(blob.size)

    def put_blob(
        self, data: bytes, media_type: str, title: str | None = None, *, inline: bool = False
    ) -> Descriptor:
        blob = describe(data, media_type, title, inline=inline)
        if not self.has_blob(blob):
            self._finish_upload(self._begin_upload(), blob, data)
        return blob

    def put_artifact(self, artifact_type: str, files: Mapping[str, bytes], **more: Any) -> bytes:
        """Upload the blobs of an artifact; its manifest, the same for the same files."""
        # image-spec 1.1, "Guidance for an Empty Descriptor".
        config = self.put_blob(b"{}", _EMPTY_TYPE)
        layers = tuple(
            self.put_blob(data, _BINARY["Content-Type"], file, inline=file in {ENVELOPE, CONTENT})
            for file, data in sorted(files.items())
        )
        return document_of(artifact_type=artifact_type, config=config, layers=layers, **more)

    def upload(
        self, blob: Descriptor, content: Callable[[], Iterator[bytes]], on_bytes: OnBytes
    ) -> None:
        """Upload a large blob; after a fault `content` begins anew and the progress steps back."""
        for attempt in range(1, transfer.ATTEMPTS + 1):
            location, offset = self._begin_upload(), 0
            try:
                for part in _parts(content()):
                    location = self._send_part(location, offset, part)
                    offset += len(part)
                    on_bytes(len(part))
                self._finish_upload(location, blob)
                return
            except (TransientError, NotFoundError) as error:
                if attempt == transfer.ATTEMPTS:
                    raise
                on_bytes(-offset)
                log.info("Sending %s to %s again: %s", blob.digest, self, error)
            except BaseException:
                with contextlib.suppress(errors.PipelineError):
                    self._cancel_upload(location)
                raise

    def check_upload(self) -> None:
        """Begin an upload, and give it up; NotFoundError without a repository made beforehand."""
        location = self._begin_upload()
        with contextlib.suppress(TransientError, NotFoundError, AccessError):
            self._cancel_upload(location)

    def _begin_upload(self) -> str:
        return self._location(self.ask("POST", "blobs/uploads/"))

    def _send_part(self, location: str, offset: int, part: bytes) -> str:
        headers = {**_BINARY, "Content-Range": f"{offset}-{offset + len(part) - 1}"}
        reply = self.ask("PATCH", location, also=(404, 416), headers=headers, body=part)
        if reply.status in {404, 416}:
            raise TransientError(f"{self} lost an upload ({reply.status}); try again")
        return self._location(reply)

    def _finish_upload(self, location: str, blob: Descriptor, data: bytes = b"") -> None:
        """Close an upload under its digest; CorruptError if the registry has other bytes."""
        url = f"{location}{'&' if urlsplit(location).query else '?'}digest={blob.digest}"
        try:
            self.ask("PUT", url, headers=_BINARY, body=data)
        except (NotFoundError, TransientError):
            if not self.has_blob(blob):  # else only the reply was lost
                raise

    def _cancel_upload(self, location: str) -> None:
        self.ask("DELETE", location, also=(404, 405, 416), push=True)

    def _location(self, reply: Reply) -> str:
        """Where an upload goes on: at the registry itself, never another host."""
        if "Location" not in reply.headers:
            raise AccessError(f"{self} does not say where an upload goes; is it an OCI registry?")
        url = joined(reply.url, reply.headers["Location"])
        if not self.transport.is_own(url):
            host = urlsplit(url).netloc
            raise AccessError(f"{self} sends uploads to another host ({host!r}); nothing was sent")
        return url


def _parts(chunks: Iterator[bytes]) -> Iterator[bytes]:
    held = bytearray()
    for chunk in chunks:
        held += chunk
        while len(held) >= PART_BYTES:
            yield bytes(held[:PART_BYTES])
            del held[:PART_BYTES]
    if held:
        yield bytes(held)


class WritableOciStore(OciStore):
    """`pipeline.registry.stores.publication.WritableStore`, in an OCI registry."""

    def repository(self, name: str) -> WritableRepository:
        return WritableRepository(transport=self.transport, name=self.address.repository(name))

    def listed(self) -> list[Listed]:
        # By tags alone: a list of referrers would be a request for each version.
        about: dict[Place, list[tuple[float, str]]] = {}
        moves: dict[tuple[str, str], list[tuple[float, str]]] = {}
        for name, tags in self.tags_of(None).items():
            statements: dict[str, list[tuple[float, str]]] = {}
            for tag in tags:
                if (statement := parse_statement_tag(tag)) is not None:
                    statements.setdefault(statement[1], []).append((0.0, statement[0]))
                elif (move := parse_move_tag(tag)) is not None:
                    moves.setdefault((name, move[0]), []).append((0.0, move[1]))
            for tag in tags:
                if (place := parse_version_tag(name, tag)) is not None:
                    about[place] = statements.get(statement_tag(place, "").removeprefix("_"), [])
        return list_variants(self.url, about, moves)

    def create_identity(self) -> str:
        began_s = time.monotonic()
        if (there := self.identity()) is not None:
            return there
        repository = self.repository(reading.IDENTITY_REPOSITORY)
        document = repository.put_artifact(reading.IDENTITY_TYPE, {CONTENT: new_identity()})
        if self.identity() is None:
            repository.put_manifest(reading.IDENTITY, document)
        took_s = min(time.monotonic() - began_s, transfer.SILENCE_S)  # others took as long as we
        time.sleep(max(SETTLE_S, 2 * took_s))
        made = self.identity()
        if made is None:
            raise TransientError(f"{repository} lost its identity while it was made; try again")
        return made

    def check_writable(self) -> None:
        try:
            self.repository("writable-check").check_upload()
        except NotFoundError:  # it wants repositories made beforehand
            log.info("%s takes no new repositories; publishing tells if it takes ours", self.url)

    def put_package(
        self, package: Package, statements: Sequence[RawStatement], on_bytes: OnBytes
    ) -> bool:
        place, manifest = sealed_manifest(package)
        if self._published(place, manifest):
            return False
        self.create_identity()
        repository = self.repository(place.name)
        blobs = [
            _put_layer(repository, layer, package, manifest, on_bytes)
            for layer in image.plan_layers(manifest, files_of(package.manifest))
        ]
        config = image_config(blobs)
        document = make_image(place, manifest, config, blobs)
        blobs.append(repository.put_blob(config, CONFIG_TYPE))
        repository.put_manifest(digest_of(document), document)
        for statement in statements:
            self._put_statement(place, document, statement)
        for blob in blobs:
            if not repository.has_blob(blob):
                raise CorruptError(
                    f"{repository} does not have {blob.digest}, which it took; nothing shows yet: "
                    "look after the registry, then run the same command again"
                )
        repository.put_manifest(version_tag(place), document)
        if not self._published(place, manifest):
            raise TransientError(f"{place} was removed while it was published; publish it again")
        add_copies(self, place.name, place.variant, copy_of(place, statements, manifest))
        return True

    def put_statement(self, place: Place, statement: RawStatement) -> bool:
        try:
            document = self.image(place).document
        except NotFoundError as error:
            raise NotFoundError(f"{self.url} has no {place}; publish it first") from error
        if new := self._put_statement(place, document, statement):
            add_copies(self, place.name, place.variant, copy_of(place, [statement]))
        return new

    def put_move(self, name: str, variant: str, data: bytes) -> bool:
        repository, digest = self.repository(name), hashlib.sha256(data).hexdigest()
        tag = move_tag(variant, digest)
        document = repository.put_artifact(reading.MOVE_TYPE, {CONTENT: data})
        if repository.manifest(tag) == document:
            return False
        repository.put_manifest(tag, document)
        add_copies(self, name, variant, {tag.partition("_")[2]: data})
        return True

    def read_copies(self, name: str, variant: str) -> bytes | None:
        repository, tag = self.repository(name), copies_tag(variant)
        if (document := repository.manifest(tag)) is None:
            return None
        found = image.parse(image.Manifest, document, f"{repository}:{tag}").annotations or {}
        return found.get(_COPIES, "").encode()

    def put_copies(self, name: str, variant: str, data: bytes) -> None:
        repository = self.repository(name)
        annotations = {_COPIES: data.decode()}
        document = repository.put_artifact(_COPIES_TYPE, {}, annotations=annotations)
        repository.put_manifest(copies_tag(variant), document)

    def put_hint(self, name: str, variant: str, channel: str, card: str, data: bytes) -> None:
        """See the Protocol: a tag for those who mount the image that a channel means."""
        try:
            version = check_part("version", json.loads(data)["version"])
            document = self.image(Place(name=name, variant=variant, version=version)).document
        except (ValueError, KeyError, TypeError, errors.RecipeError, NotFoundError) as error:
            log.warning("%s of %s gets no image tag: %s", channel, variant, error)
            return
        self.repository(name).put_manifest(channel_tag(variant, channel, card), document)

    def delete_package(self, place: Place) -> int:
        """See the Protocol; the registry's own collector frees the layers, which no tag names."""
        try:
            there = self.image(place)
        except NotFoundError:
            return 0
        repository = self.repository(place.name)
        found = self.statement_references(place)
        repository.delete_manifest(digest_of(there.document))
        self._images.pop(place, None)
        for reference in itertools.chain(*found.values()):
            if (document := repository.manifest(reference)) is not None:
                repository.delete_manifest(digest_of(document))
        return sum(layer.size for layer in there.layers)

    def now_s(self) -> float:
        """This machine's clock: a registry dates nothing."""
        return time.time()

    def leftovers(self, min_age_s: float, *, delete: bool) -> list[str]:
        """None: uploads that broke off expire in the registry, and nothing lists them."""
        return []

    def _published(self, place: Place, manifest: bytes) -> bool:
        self._images.pop(place, None)
        with contextlib.suppress(CorruptError, NotFoundError):
            return self.image(place).manifest == manifest
        return False  # or a tag that is rubbish

    def _put_statement(self, place: Place, document: bytes, statement: RawStatement) -> bool:
        check_statement(statement)
        repository, tag = self.repository(place.name), statement_tag(place, statement.name)
        made = repository.put_artifact(
            reading.STATEMENT_TYPE,
            statement.files,
            subject=describe(document, image.MANIFEST_TYPE),
            annotations={reading.NAME: statement.name},
        )
        if repository.manifest(tag) == made:
            return False
        repository.put_manifest(tag, made)
        return True


def _put_layer(
    repository: WritableRepository,
    layer: Layer,
    package: Package,
    manifest: bytes,
    on_bytes: OnBytes,
) -> Descriptor:
    """Upload a layer, unless it is there; counts the bytes of its files."""
    whole = hashlib.sha256()
    for chunk in tar_of(layer, package.dir, manifest):
        whole.update(chunk)
    digest = f"sha256:{whole.hexdigest()}"
    blob = Descriptor(media_type=LAYER_TYPE, digest=digest, size=layer.size_bytes)
    left = sum(one.file.size_bytes for one in layer.members if one.file.path != MANIFEST)

    def on_sent(count: int) -> None:
        nonlocal left
        left -= count
        on_bytes(count)

    if not repository.has_blob(blob):
        repository.upload(blob, lambda: tar_of(layer, package.dir, manifest), on_sent)
    on_bytes(left)  # negative: what the tar adds to the files
    return blob
