"""Publish a package as an image; the tag comes last, and makes it visible."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from pipeline.core.errors import ConflictError, CorruptError
from pipeline.core.values import FileDigest, Package
from pipeline.registry.manifest import MANIFEST, digest_bytes, manifest_bytes
from pipeline.registry.stores.oci.address import version_tag
from pipeline.registry.stores.oci.content import layer_content
from pipeline.registry.stores.oci.distribution import Repository
from pipeline.registry.stores.oci.documents import Descriptor
from pipeline.registry.stores.oci.image import (
    CONFIG_TYPE,
    LAYER_TYPE,
    MANIFEST_OFFSET,
    SIGNATURE,
    Image,
    Layer,
    image_config,
    layer_descriptor,
    make_image,
    parse_image,
    plan_layers,
    signature_layer,
)
from pipeline.registry.stores.oci.record import known_digest, remember
from pipeline.registry.stores.oci.referrers import put_referrers
from pipeline.registry.stores.oci.tagged import settle
from pipeline.registry.stores.oci.upload import upload_stream
from pipeline.registry.stores.store import Place

log = logging.getLogger(__name__)

_MODEL_STATEMENT = "model-"
_MODEL_SIGNATURE = "model.sig"


def publish(
    repository: Repository,
    place: Place,
    package: Package,
    statements: Mapping[str, Mapping[str, bytes]],
    on_bytes: Callable[[int], None],
) -> bool:
    """Do what `WritableStore.put_package` promises."""
    manifest = manifest_bytes(package.manifest)
    if digest_bytes(manifest) != package.digest:
        raise CorruptError(f"{package.dir} has not the digest {package.digest}; build it again")
    files = [
        FileDigest(path=file["path"], size_bytes=file["size"], sha256=file["sha256"])
        for file in package.manifest["files"]
    ]
    tag = version_tag(place.variant, place.version)
    there = _published(repository, tag)
    if there is None:
        layers = [
            _put_layer(repository, layer, package, manifest, on_bytes)
            for layer in plan_layers(manifest, files)
        ]
        signature = model_signature(statements)
        if signature is not None and all(file.path != SIGNATURE for file in files):
            layers.append(repository.put_blob(signature_layer(signature), LAYER_TYPE))
        config = image_config(layers)
        repository.put_blob(config, CONFIG_TYPE)
        document = make_image(place, manifest, config, layers)
        # Under its digest first: some registries want the subject of a statement to be there.
        repository.put_manifest(document.digest, document)
        put_referrers(repository, document.descriptor(), statements)
        there = _published(repository, tag)
        if there is None:
            repository.put_manifest(tag, document)
            settle()
            there = _published(repository, tag)
            if there is not None and there.document.digest == document.digest:
                return True
    if there is None:
        raise ConflictError(f"{repository}:{tag} was removed while it was published; try again")
    _require_same(repository, tag, there, package.digest)
    put_referrers(repository, there.document.descriptor(), statements)
    return False


def model_signature(statements: Mapping[str, Mapping[str, bytes]]) -> bytes | None:
    """The model signature that goes into the image: that of the first key, by name."""
    for name in sorted(statements):
        if name.startswith(_MODEL_STATEMENT) and _MODEL_SIGNATURE in statements[name]:
            return statements[name][_MODEL_SIGNATURE]
    return None


def _published(repository: Repository, tag: str) -> Image | None:
    document = repository.manifest(tag)
    return None if document is None else parse_image(document, f"{repository}:{tag}")


def _require_same(repository: Repository, tag: str, there: Image, digest: str) -> None:
    advice = "nothing was overwritten; run the same command with --rebuild to publish beside it"
    if there.package_digest != digest:
        raise ConflictError(
            f"{repository}:{tag} is already published with other bytes (digest "
            f"{there.package_digest[:12]}, these have {digest[:12]}); {advice}"
        )
    try:
        read_package_manifest(repository, there)
    except CorruptError as error:
        raise ConflictError(f"{repository}:{tag} is taken, and damaged ({error}); {advice}") from (
            error
        )


def read_package_manifest(repository: Repository, image: Image) -> bytes:
    """The bytes of `manifest.json`, by one ranged request into the first layer.

    Raises:
        CorruptError: They are not what the image manifest says.
    """
    end = MANIFEST_OFFSET + image.manifest_bytes
    with repository.open_blob(image.layers[0].digest, MANIFEST_OFFSET, end) as chunks:
        data = b"".join(chunks)
    if digest_bytes(data) != image.package_digest:
        raise CorruptError(
            f"{repository}: {MANIFEST} of {image.place} has digest {digest_bytes(data)}, its image "
            f"says {image.package_digest[:80]!r}; publish it again"
        )
    return data


def _put_layer(
    repository: Repository,
    layer: Layer,
    package: Package,
    manifest: bytes,
    on_bytes: Callable[[int], None],
) -> Descriptor:
    """Upload a layer, unless an earlier try did."""
    digest = known_digest(layer)
    if digest is not None:
        descriptor = layer_descriptor(digest, layer.size_bytes)
        if repository.has_blob(descriptor):
            log.info("%s has layer %s already", repository, digest)
            on_bytes(layer.content_before(layer.size_bytes))
            return descriptor
    reported = 0

    def on_position(position: int) -> None:
        nonlocal reported
        sent = layer.content_before(position)
        if sent > reported:  # after a fault it starts further back
            on_bytes(sent - reported)
            reported = sent

    digest = upload_stream(
        repository,
        layer.size_bytes,
        lambda: layer_content(layer, package.dir, manifest),
        on_position,
    )
    remember(layer, digest)
    return layer_descriptor(digest, layer.size_bytes)
