"""An OCI registry as a store: versions are images, statements referrers, channels tags.

    oci://HOST[:PORT]/PREFIX       what lies where below it, `address` tells
    image.py                       what an image of a package looks like

A version is there as soon as its tag is, and not before: layers, config, the image manifest under
its digest, the statements, then the tag. Tags have no compare-and-set: two publishers of different
bytes who both found the tag free within a few milliseconds overwrite each other; each reads back
after a moment, and the one whose image is gone is told so. What a client pulled in between carries
a valid signature; its digest is not the one that the version has in the end.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property

from pydantic.dataclasses import dataclass

from pipeline.core.errors import AccessError, CorruptError, NotFoundError, RecipeError
from pipeline.core.settings import STRICT
from pipeline.core.values import FileDigest, Package
from pipeline.registry.manifest import MANIFEST, parse_manifest
from pipeline.registry.reference import check_part
from pipeline.registry.stores.oci.address import (
    Address,
    channel_tag,
    parse_address,
    parse_version_tag,
    version_tag,
)
from pipeline.registry.stores.oci.auth import find_credentials
from pipeline.registry.stores.oci.channels import put_channel_file, read_channels
from pipeline.registry.stores.oci.distribution import Repository
from pipeline.registry.stores.oci.image import (
    Image,
    Layer,
    Member,
    parse_image,
    plan_layers,
)
from pipeline.registry.stores.oci.publish import publish, read_package_manifest
from pipeline.registry.stores.oci.referrers import (
    delete_referrers,
    list_referrers,
    put_referrer,
    read_referrer,
)
from pipeline.registry.stores.oci.transport import Request, Transport
from pipeline.registry.stores.store import Place, StoredStatement

log = logging.getLogger(__name__)

_PROBE = "writable-check"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OciStore:
    """`pipeline.registry.stores.store.WritableStore`, in an OCI registry.

    Attributes:
        url: `oci://HOST[:PORT]/PREFIX`; the repository of a recipe is `PREFIX/<name>`.
        plain_http: Speak HTTP without TLS; None for only where the host is this machine.
        public: Whether everybody can read it.
        timeout_s: A reply that is silent for so long has stalled.
    """

    url: str
    plain_http: bool | None = None
    public: bool = False
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        parse_address(self.url, self.plain_http)

    @property
    def local(self) -> bool:
        return False

    def names(self) -> list[str]:
        repository = Repository(transport=self._transport, name="")
        request = Request(
            method="GET",
            url=f"{self._address.api}/v2/",
            scope="registry:catalog:*",
            doing=f"list the repositories of {self._address.host}",
            expect=(200,),
        )
        try:
            found = repository.pages(request, "_catalog", "repositories")
        except (NotFoundError, AccessError) as error:
            raise AccessError(
                f"{error}. Many registries do not list what they have: name the package"
            ) from error
        names = {name for one in found if (name := self._address.name_of(one))}
        return sorted(name for name in names if self.variants(name))

    def variants(self, name: str) -> list[str]:
        return sorted({variant for variant, _ in self._tagged(name)})

    def versions(self, name: str, variant: str) -> list[str]:
        return sorted(version for held, version in self._tagged(name) if held == variant)

    def read_manifest(self, place: Place) -> bytes:
        return self._open(place)[1]

    @contextlib.contextmanager
    def open_file(
        self, place: Place, file: FileDigest, offset: int = 0, end: int | None = None
    ) -> Iterator[Iterator[bytes]]:
        image, layers = self._planned(place)
        for layer, descriptor in zip(layers, image.layers, strict=False):
            for member in layer.members:
                if member.file.path == file.path:
                    if layer.size_bytes != descriptor.size_bytes:
                        raise CorruptError(
                            f"{place} has a layer of {descriptor.size_bytes} bytes where its "
                            f"manifest makes {layer.size_bytes}; publish it again"
                        )
                    with self._open_member(place, descriptor.digest, member, offset, end) as chunks:
                        yield chunks
                    return
        raise NotFoundError(f"{place} has no file {file.path}")

    def statements(self, place: Place) -> list[StoredStatement]:
        image = self._image(place)
        if image is None:
            return []
        return [
            StoredStatement(
                name=one.name,
                made_s=one.made_s,
                sizes={name: blob.size_bytes for name, blob in one.files.items()},
            )
            for one in list_referrers(self._repository(place.name), image.document.digest)
        ]

    def read_statement(self, place: Place, name: str) -> dict[str, bytes]:
        check_part("statement", name)
        repository = self._repository(place.name)
        digest = self._require(place).document.digest
        for one in list_referrers(repository, digest):
            if one.name == name:
                return read_referrer(repository, one)
        raise NotFoundError(f"{place} has no statement {name}")

    def channels(self, name: str, variant: str) -> dict[str, bytes]:
        return read_channels(self._repository(name), variant, "channel")

    def moves(self, name: str, variant: str) -> dict[str, bytes]:
        return read_channels(self._repository(name), variant, "move")

    def check_writable(self) -> None:
        name = f"{self._address.prefix}/{_PROBE}".lstrip("/")
        repository = Repository(transport=self._transport, name=name)
        try:
            repository.cancel_upload(repository.begin_upload())
        except (
            NotFoundError
        ):  # it wants repositories made beforehand: then it tells when we publish
            log.info("%s does not take new repositories; not known whether it takes ours", self.url)

    def put_package(
        self,
        package: Package,
        statements: Mapping[str, Mapping[str, bytes]],
        on_bytes: Callable[[int], None],
    ) -> bool:
        place = Place(
            name=package.manifest["name"],
            variant=package.manifest["variant"],
            version=package.manifest["version"],
        )
        self._plans.pop(place, None)
        return publish(self._repository(place.name), place, package, statements, on_bytes)

    def put_statement(self, place: Place, name: str, files: Mapping[str, bytes]) -> bool:
        subject = self._require(place).document.descriptor()
        return put_referrer(self._repository(place.name), subject, name, files)

    def put_move(self, name: str, variant: str, file: str, data: bytes) -> None:
        put_channel_file(self._repository(name), variant, "move", file, data)

    def put_channel(self, name: str, variant: str, file: str, data: bytes) -> None:
        repository = self._repository(name)
        put_channel_file(repository, variant, "channel", file, data)
        channel, _, card = file.removesuffix(".json").partition(".")
        try:
            version = check_part("version", json.loads(data)["version"])
            tag = channel_tag(variant, channel, card)
        except (ValueError, KeyError, TypeError, RecipeError) as error:
            log.warning("%s of %s gets no image tag: %s", file, variant, error)
            return
        # For those who mount the image by a tag; our own clients read the artifact.
        image = self._require(Place(name=name, variant=variant, version=version))
        repository.put_manifest(tag, image.document)

    def delete_version(self, place: Place) -> int:
        image = self._require(place)
        repository = self._repository(place.name)
        repository.delete_manifest(image.document.digest)
        self._plans.pop(place, None)
        return delete_referrers(repository, image.document.digest) + sum(
            layer.size_bytes for layer in image.layers
        )

    def now_s(self) -> float:
        """This machine's clock: referrers carry their writers' own dates."""
        return time.time()

    def leftovers(self, min_age_s: float, *, delete: bool) -> list[str]:
        """None: uploads that broke off expire in the registry, and nobody can list them."""
        return []

    @cached_property
    def _address(self) -> Address:
        return parse_address(self.url, self.plain_http)

    @cached_property
    def _transport(self) -> Transport:
        credentials = find_credentials(self._address.host, os.environ)
        return Transport(self._address.api, credentials, self.timeout_s)

    @cached_property
    def _plans(self) -> dict[Place, tuple[Image, tuple[Layer, ...]]]:
        """Of versions that were read: a version never changes, and a pull asks for many pieces."""
        return {}

    def _repository(self, name: str) -> Repository:
        return Repository(transport=self._transport, name=self._address.repository(name))

    def _tagged(self, name: str) -> list[tuple[str, str]]:
        tags = self._repository(name).tags()
        return [found for tag in tags if (found := parse_version_tag(tag))]

    def _image(self, place: Place) -> Image | None:
        tag = version_tag(place.variant, place.version)
        repository = self._repository(place.name)
        document = repository.manifest(tag)
        return None if document is None else parse_image(document, f"{repository}:{tag}")

    def _require(self, place: Place) -> Image:
        image = self._image(place)
        if image is None:
            raise NotFoundError(f"{self.url} has no {place}")
        return image

    def _open(self, place: Place) -> tuple[Image, bytes]:
        image = self._require(place)
        data = read_package_manifest(self._repository(place.name), image)
        return image, data

    def _planned(self, place: Place) -> tuple[Image, tuple[Layer, ...]]:
        if place not in self._plans:
            image, data = self._open(place)
            manifest = parse_manifest(data, f"{MANIFEST} of {place}")
            files = [
                FileDigest(path=one["path"], size_bytes=one["size"], sha256=one["sha256"])
                for one in manifest["files"]
            ]
            self._plans[place] = image, plan_layers(data, files)
        return self._plans[place]

    @contextlib.contextmanager
    def _open_member(
        self, place: Place, digest: str, member: Member, offset: int, end: int | None
    ) -> Iterator[Iterator[bytes]]:
        start = member.offset + offset
        size_bytes = member.file.size_bytes
        stop = member.offset + (size_bytes if end is None else min(end, size_bytes))
        if start >= stop:
            yield iter(())
            return
        try:
            with self._repository(place.name).open_blob(digest, start, stop) as chunks:
                yield chunks
        except NotFoundError:
            self._plans.pop(place, None)  # perhaps deleted and published again
            raise


KIND = OciStore
