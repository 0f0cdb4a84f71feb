"""An OCI registry as a store: versions are images, statements their referrers, each with a tag.

A version is there as soon as its tag is, and not before: layers, config, the image manifest under
its digest, statements, sizes asked back, then the tag. Blobs have the name of their digest, so what
is there is right. Tags have no exclusive creation, but a name that follows from its content needs
none: who may push may overwrite, and readers find that out.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.core.errors import (
    AccessError,
    ConflictError,
    CorruptError,
    NotFoundError,
    RecipeError,
    TransientError,
)
from pipeline.core.values import FileDigest, Package
from pipeline.registry.manifest import MANIFEST, files_of, parse_manifest
from pipeline.registry.reference import check_part, reference_of
from pipeline.registry.store import (
    ENVELOPE,
    MAX_ATTACHMENT_BYTES,
    MAX_ENVELOPE_BYTES,
    MAX_MOVES,
    NONE_KNOWN,
    OnBytes,
    Place,
    RawStatement,
    is_attachment_name,
    is_statement_name,
)
from pipeline.registry.stores.layout import new_identity, parse_identity
from pipeline.registry.stores.objects import bounded, bounded_kinds, in_parallel, readable
from pipeline.registry.stores.oci.address import (
    Address,
    channel_tag,
    move_start,
    move_tag,
    parse_statement_tag,
    parse_version_tag,
    statement_tag,
    version_tag,
)
from pipeline.registry.stores.oci.distribution import Repository
from pipeline.registry.stores.oci.documents import (
    EMPTY,
    EMPTY_TYPE,
    MANIFEST_TYPE,
    TITLE,
    Descriptor,
    Manifest,
    describe,
    digest_of,
    parse,
)
from pipeline.registry.stores.oci.image import (
    CONFIG_TYPE,
    Image,
    Layer,
    image_config,
    make_image,
    parse_image,
    plan_layers,
)
from pipeline.registry.stores.oci.transport import Transport
from pipeline.registry.stores.publication import (
    check_statement,
    require_same_manifest,
    sealed_manifest,
)

log = logging.getLogger(__name__)

STATEMENT_TYPE = "application/vnd.enginesmith.statement.v1"
MOVE_TYPE = "application/vnd.enginesmith.move.v1"
IDENTITY_TYPE = "application/vnd.enginesmith.registry.v1"
NAME = "io.enginesmith.statement.name"
_FILE_TYPE = "application/octet-stream"
_IDENTITY, _IDENTITY_REPOSITORY, _PROBE = "identity", "registry", "writable-check"
_CONTENT = "content.json"
SETTLE_S = 1.0
"""After it, what others began to write under a tag that they saw free has arrived."""


@dataclass(frozen=True, kw_only=True)
class OciStore:
    """`pipeline.registry.store.WritableStore`, in an OCI registry.

    Attributes:
        url: For messages.
        public: Whether everybody can read it.
        address: What of the registry is ours.
        transport: The way there.
    """

    url: str
    public: bool
    address: Address
    transport: Transport
    _images: dict[Place, Image] = field(default_factory=dict)
    """Of versions that were read: a version never changes, and a pull asks for many pieces."""

    @property
    def local(self) -> bool:
        return False

    def identity(self) -> str | None:
        repository = self._repository(_IDENTITY_REPOSITORY)
        document = repository.manifest(_IDENTITY)
        if document is None:
            return None
        origin = f"{repository}:{_IDENTITY}"
        return parse_identity(_content(repository, document, IDENTITY_TYPE, _CONTENT), origin)

    def create_identity(self) -> str:
        began_s = time.monotonic()
        if (there := self.identity()) is not None:
            return there
        repository = self._repository(_IDENTITY_REPOSITORY)
        document = _put_artifact(repository, IDENTITY_TYPE, {_CONTENT: new_identity()})
        if self.identity() is None:
            repository.put_manifest(_IDENTITY, document)
        time.sleep(max(SETTLE_S, 2 * (time.monotonic() - began_s)))  # others took as long as we
        made = self.identity()
        if made is None:
            raise TransientError(f"{repository} lost its identity while it was made; try again")
        return made

    def statement_names(
        self, name: str | None = None, variant: str | None = None
    ) -> dict[Place, tuple[str, ...]]:
        tagged = self._tagged(name, variant)
        listed = in_parallel(self._referrers, tagged)
        return {
            place: tuple(names if native is None else native)
            for (place, names), native in zip(tagged.items(), listed, strict=True)
        }

    def places(self, name: str | None = None, variant: str | None = None) -> list[Place]:
        return sorted(self._tagged(name, variant))

    def read_manifest(self, place: Place) -> bytes:
        return self._image(place).manifest

    @contextlib.contextmanager
    def open_file(
        self, place: Place, file: FileDigest, offset: int = 0, end: int | None = None
    ) -> Iterator[Iterator[bytes]]:
        digest, start = self._find(place, file)
        stop = file.size_bytes if end is None else min(end, file.size_bytes)
        if offset >= stop:
            yield iter(())
            return
        blob = self._repository(place.name).open_blob(digest, start + offset, start + stop)
        with blob as chunks:
            yield chunks

    def read_statements(
        self, place: Place, names: Collection[str] | None = None
    ) -> list[RawStatement]:
        what = f"{self.url}: statements of {place}"
        found = self._listed_statements(place, names)
        repository = self._repository(place.name)

        def read(name: str) -> RawStatement | None:
            try:
                document = repository.manifest(found[name])
                data = _content(repository, document, STATEMENT_TYPE, ENVELOPE)
            except (CorruptError, NotFoundError):
                return None
            return RawStatement(name=name, files={ENVELOPE: data})

        return readable(in_parallel(read, bounded_kinds(sorted(found), what)), what)

    def read_statement(self, place: Place, name: str) -> RawStatement:
        found = self._listed_statements(place, {name})
        repository = self._repository(place.name)
        document = repository.manifest(found[name]) if name in found else None
        envelope = _content(repository, document, STATEMENT_TYPE, ENVELOPE)
        attachments = {
            file: repository.blob(blob, MAX_ATTACHMENT_BYTES)
            for file, blob in _blobs(repository, document, STATEMENT_TYPE).items()
            if is_attachment_name(file)
        }
        return RawStatement(name=name, files={ENVELOPE: envelope, **attachments})

    def read_moves(
        self, name: str, variant: str, known: Mapping[str, bytes] = NONE_KNOWN
    ) -> list[bytes]:
        repository = self._repository(name)
        what = f"{self.url}: moves of {name}/{variant}"
        tags = sorted(tag for tag in repository.tags() if tag.startswith(move_start(variant)))
        held = {move_tag(variant, data): data for data in known.values()}

        def read(tag: str) -> bytes | None:
            if tag in held:
                return held[tag]
            try:
                return _content(repository, repository.manifest(tag), MOVE_TYPE, _CONTENT)
            except (CorruptError, NotFoundError):
                return None

        return readable(in_parallel(read, bounded(tags, MAX_MOVES, what)), what)

    def check_writable(self) -> None:
        repository = self._repository(_PROBE)
        try:
            repository.check_upload()
        except NotFoundError:  # it wants repositories made beforehand
            log.info(
                "%s takes no new repositories; publishing tells whether it takes ours", self.url
            )

    def put_package(
        self,
        package: Package,
        statements: Sequence[RawStatement],
        on_bytes: OnBytes = lambda _: None,
    ) -> bool:
        manifest = sealed_manifest(package)
        place = Place.of(reference_of(package))
        if self._published(place, manifest):
            return False
        self.create_identity()
        repository = self._repository(place.name)
        layers = plan_layers(manifest, files_of(package.manifest))
        blobs = [
            self._put_layer(repository, layer, package, manifest, on_bytes) for layer in layers
        ]
        config = image_config(blobs)
        blobs.append(repository.put_blob(config, CONFIG_TYPE))
        image = make_image(place, manifest, config, blobs[:-1])
        repository.put_manifest(digest_of(image), image)
        for statement in statements:
            self._put_statement(place, image, statement)
        for blob in blobs:
            if not repository.has_blob(blob):
                raise CorruptError(
                    f"{repository} does not have {blob.digest}, which it took; nothing shows yet: "
                    "look after the registry, then run the same command again"
                )
        repository.put_manifest(version_tag(place), image)
        if not self._published(place, manifest):
            raise TransientError(f"{place} was removed while it was published; publish it again")
        return True

    def put_statement(self, place: Place, statement: RawStatement) -> bool:
        try:
            image = self._image(place).document
        except NotFoundError as error:
            raise NotFoundError(f"{self.url} has no {place}; publish it first") from error
        return self._put_statement(place, image, statement)

    def put_move(self, name: str, variant: str, data: bytes) -> bool:
        repository, tag = self._repository(name), move_tag(variant, data)
        document = _put_artifact(repository, MOVE_TYPE, {_CONTENT: data})
        if repository.manifest(tag) == document:
            return False
        repository.put_manifest(tag, document)
        return True

    def put_hint(self, name: str, variant: str, channel: str, card: str, data: bytes) -> None:
        """See the Protocol: a tag for those who mount the image that a channel means."""
        try:
            version = check_part("version", json.loads(data)["version"])
            place = Place(name=name, variant=variant, version=version)
            image = self._image(place).document
        except (ValueError, KeyError, TypeError, RecipeError, NotFoundError) as error:
            log.warning("%s of %s gets no image tag: %s", channel, variant, error)
            return
        self._repository(name).put_manifest(channel_tag(variant, channel, card), image)

    def delete_package(self, place: Place) -> int:
        """See the Protocol; the registry's own collector frees the layers, which no tag names."""
        try:
            image = self._image(place)
        except NotFoundError:
            return 0
        repository = self._repository(place.name)
        found = self._listed_statements(place, None)
        repository.delete_manifest(digest_of(image.document))
        self._images.pop(place, None)
        for reference in found.values():
            if (document := repository.manifest(reference)) is not None:
                repository.delete_manifest(digest_of(document))
        return sum(layer.size for layer in image.layers)

    def now_s(self) -> float:
        """This machine's clock: a registry dates nothing."""
        return time.time()

    def leftovers(self, min_age_s: float, *, delete: bool) -> list[str]:
        """None: uploads that broke off expire in the registry, and nothing lists them."""
        return []

    def _repository(self, name: str) -> Repository:
        return Repository(transport=self.transport, name=self.address.repository(name))

    def _names(self) -> list[str]:
        try:
            found = Repository(transport=self.transport, name="").catalog()
        except (NotFoundError, AccessError) as error:
            raise AccessError(
                f"{error}. Many registries do not list what they have: name the package"
            ) from error
        return [name for one in found if (name := self.address.name_of(one))]

    def _tagged(self, name: str | None, variant: str | None) -> dict[Place, list[str]]:
        """Places by the tags of recipes, with the statements that have a tag."""
        names = self._names() if name is None else [check_part("name", name)]
        found: dict[Place, list[str]] = {}
        tags_of = in_parallel(lambda one: self._repository(one).tags(), names)
        for one, tags in zip(names, tags_of, strict=True):
            statements: dict[str, list[str]] = {}
            for tag in tags:
                if (statement := parse_statement_tag(tag)) is not None:
                    statements.setdefault(statement[1], []).append(statement[0])
            for tag in tags:
                place = parse_version_tag(one, tag)
                if place is not None and variant in {None, place.variant}:
                    about = statement_tag(place, "").removeprefix("_")
                    found[place] = statements.get(about, [])
        return found

    def _referrers(self, place: Place) -> dict[str, str] | None:
        """Statement -> digest, as the registry itself lists them; None if it has no such list.

        Who may push can move a tag, but not take an entry from this list.
        """
        try:
            subject = digest_of(self._image(place).document)
        except (CorruptError, NotFoundError):  # its reader hears of it
            return {}
        listed = self._repository(place.name).referrers(subject)
        if listed is None:
            return None
        return {
            name: one.digest
            for one in listed
            if one.artifact_type in {None, "", STATEMENT_TYPE}
            and is_statement_name(name := one.annotation(NAME))
        }

    def _listed_statements(self, place: Place, names: Collection[str] | None) -> dict[str, str]:
        """Statement -> digest or tag."""
        found = self._referrers(place)
        if found is None:
            known = names
            if known is None:
                known = self._tagged(place.name, place.variant).get(place, [])
            found = {name: statement_tag(place, name) for name in known}
        return {name: where for name, where in found.items() if names is None or name in names}

    def _image(self, place: Place) -> Image:
        if place not in self._images:
            repository, tag = self._repository(place.name), version_tag(place)
            document = repository.manifest(tag)
            if document is None:
                raise NotFoundError(f"{self.url} has no {place}")
            self._images[place] = parse_image(document, f"{repository}:{tag}")
        return self._images[place]

    def _published(self, place: Place, manifest: bytes) -> bool:
        """Whether exactly this manifest has the version's tag."""
        self._images.pop(place, None)
        try:
            there = self._image(place).manifest
        except NotFoundError:
            return False
        except CorruptError:
            there = b""
        require_same_manifest(there, manifest, self.url, place)
        return True

    def _find(self, place: Place, file: FileDigest) -> tuple[str, int]:
        """The layer that has a file, and where in the layer its bytes begin."""
        image = self._image(place)
        for layer, descriptor in zip(_planned(image.manifest), image.layers, strict=False):
            for member in layer.members:
                if member.file.path == file.path:
                    if layer.size_bytes != descriptor.size:
                        raise CorruptError(
                            f"{place} has a layer of {descriptor.size} bytes where its "
                            f"manifest makes {layer.size_bytes}; publish it again"
                        )
                    return descriptor.digest, member.offset
        raise NotFoundError(f"{place} has no file {file.path}")

    def _put_layer(
        self,
        repository: Repository,
        layer: Layer,
        package: Package,
        manifest: bytes,
        on_bytes: OnBytes,
    ) -> Descriptor:
        """Upload a layer, unless it is there; counts the bytes of its files."""
        blob = layer.describe(package.dir, manifest)
        total = sum(one.file.size_bytes for one in layer.members if one.file.path != MANIFEST)
        counted = 0

        def on_position(position: int) -> None:
            nonlocal counted
            reached = total * position // blob.size
            if reached > counted:  # after a fault it starts further back
                on_bytes(reached - counted)
                counted = reached

        if not repository.has_blob(blob):
            content = functools.partial(layer.content, package.dir, manifest)
            repository.upload(blob, content, on_position)
        on_position(blob.size)
        return blob

    def _put_statement(self, place: Place, image: bytes, statement: RawStatement) -> bool:
        check_statement(statement)
        repository, tag = self._repository(place.name), statement_tag(place, statement.name)
        subject = describe(image, MANIFEST_TYPE)
        name = {NAME: statement.name}
        document = _put_artifact(repository, STATEMENT_TYPE, statement.files, name, subject)
        there = repository.manifest(tag)
        if there is None:
            repository.put_manifest(tag, document)
        elif there != document:
            raise ConflictError(
                f"{repository}: something else has the tag {tag}, and statements are only ever "
                "added; sign this one again, which gives it another name"
            )
        return there is None


@functools.lru_cache(maxsize=64)
def _planned(manifest: bytes) -> tuple[Layer, ...]:
    return plan_layers(manifest, files_of(parse_manifest(manifest, MANIFEST)))


def _put_artifact(
    repository: Repository,
    artifact_type: str,
    files: Mapping[str, bytes],
    annotations: dict[str, str] | None = None,
    subject: Descriptor | None = None,
) -> bytes:
    """Upload the blobs of an artifact; its manifest, the same for the same files."""
    config = repository.put_blob(EMPTY, EMPTY_TYPE)
    layers = [
        repository.put_blob(data, _FILE_TYPE, file, inline=file in {ENVELOPE, _CONTENT})
        for file, data in sorted(files.items())
    ]
    return Manifest(
        artifact_type=artifact_type,
        config=config,
        layers=tuple(layers),
        subject=subject,
        annotations=annotations,
    ).document()


def _blobs(
    repository: Repository, document: bytes | None, artifact_type: str
) -> dict[str, Descriptor]:
    """File name -> blob of an artifact."""
    if document is None:
        raise NotFoundError(f"{repository} has no such {artifact_type}")
    origin = f"{repository}@{digest_of(document)}"
    manifest = parse(Manifest, document, origin)
    if manifest.artifact_type != artifact_type:
        raise CorruptError(f"{origin} is of type {manifest.artifact_type!r}; remove it")
    return {blob.annotation(TITLE): blob for blob in manifest.layers}


def _content(
    repository: Repository, document: bytes | None, artifact_type: str, file: str
) -> bytes:
    """The small file of an artifact that all readers read."""
    blob = _blobs(repository, document, artifact_type).get(file)
    if blob is None:
        raise CorruptError(f"{repository}: a {artifact_type} has no {file}; remove it")
    return repository.blob(blob, MAX_ENVELOPE_BYTES)
