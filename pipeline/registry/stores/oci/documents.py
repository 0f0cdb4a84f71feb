"""The JSON documents of an OCI registry: descriptors, manifests, indexes; read with suspicion."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import rfc8785

from pipeline.core.errors import CorruptError

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
EMPTY = b"{}"
"""Config of an artifact that needs none (image-spec 1.1, "Guidance for an Empty Descriptor")."""
TITLE = "org.opencontainers.image.title"
CREATED = "org.opencontainers.image.created"
MAX_DOCUMENT_BYTES = 4 << 20
"""What registries take at least (distribution-spec 1.1, "Pushing manifests"), and most take."""

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Descriptor:
    """Names bytes by their digest.

    Attributes:
        media_type: Of the bytes.
        digest: `sha256:` and 64 hex digits.
        size_bytes: Of the bytes.
        artifact_type: Of the manifest that it names; empty for others.
        annotations: Text about it.
        data: The bytes themselves, when they travel with it; not yet checked against the digest.
    """

    media_type: str
    digest: str
    size_bytes: int
    artifact_type: str = ""
    annotations: Mapping[str, str] = field(default_factory=dict)
    data: bytes | None = None

    @property
    def title(self) -> str:
        """The file name that it has in an artifact; empty if it has none."""
        return self.annotations.get(TITLE, "")

    def carrying(self, data: bytes) -> Descriptor:
        """The same, with the bytes in it."""
        return dataclasses.replace(self, data=data)

    def to_json(self) -> dict[str, Any]:
        """As image-spec 1.1 writes it."""
        value: dict[str, Any] = {
            "mediaType": self.media_type,
            "digest": self.digest,
            "size": self.size_bytes,
        }
        if self.annotations:
            value["annotations"] = dict(self.annotations)
        if self.data is not None:
            value["data"] = base64.b64encode(self.data).decode()
        return value


@dataclass(frozen=True, kw_only=True)
class Document:
    """A manifest or an index, as it lies in the registry."""

    media_type: str
    data: bytes

    @property
    def digest(self) -> str:
        """`sha256:` and 64 hex digits."""
        return digest_of(self.data)

    def descriptor(self) -> Descriptor:
        """What names it."""
        return Descriptor(media_type=self.media_type, digest=self.digest, size_bytes=len(self.data))


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """An image or an artifact."""

    artifact_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]
    subject: Descriptor | None
    annotations: Mapping[str, str]

    def document(self) -> Document:
        """Its bytes; the same for the same content."""
        value: dict[str, Any] = {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "artifactType": self.artifact_type,
            "config": self.config.to_json(),
            "layers": [layer.to_json() for layer in self.layers],
            "annotations": dict(self.annotations),
        }
        if self.subject is not None:
            value["subject"] = self.subject.to_json()
        return Document(media_type=MANIFEST_TYPE, data=rfc8785.dumps(value))


def artifact(
    artifact_type: str,
    layers: tuple[Descriptor, ...],
    annotations: Mapping[str, str],
    subject: Descriptor | None = None,
) -> Manifest:
    """A manifest that is no image. Its config is `EMPTY`, which must be uploaded, too."""
    config = describe(EMPTY, EMPTY_TYPE)
    return Manifest(
        artifact_type=artifact_type,
        config=config,
        layers=layers or (config,),  # image-spec 1.1: never without a layer
        subject=subject,
        annotations=annotations,
    )


def describe(data: bytes, media_type: str, **annotations: str) -> Descriptor:
    """Name bytes that we hold."""
    return Descriptor(
        media_type=media_type, digest=digest_of(data), size_bytes=len(data), annotations=annotations
    )


def parse_manifest(document: Document, origin: str) -> Manifest:
    """Read a manifest.

    Raises:
        CorruptError: It is none.
    """
    value = parse_object(document.data, origin)
    try:
        subject = value.get("subject")
        return Manifest(
            artifact_type=_text(value.get("artifactType", "")),
            config=_descriptor(value["config"]),
            layers=tuple(_descriptor(layer) for layer in value["layers"]),
            subject=None if subject is None else _descriptor(subject),
            annotations=_annotations(value.get("annotations")),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptError(f"{origin} is not an OCI manifest: {error!r}") from error


def parse_index(data: bytes, origin: str) -> tuple[Descriptor, ...]:
    """Read a list of manifests.

    Raises:
        CorruptError: It is none.
    """
    value = parse_object(data, origin)
    try:
        return tuple(_descriptor(entry) for entry in value["manifests"] or ())
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptError(f"{origin} is not an OCI index: {error!r}") from error


def parse_object(data: bytes, origin: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CorruptError: It is none.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{origin} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CorruptError(f"{origin} is not a JSON object")
    return value


def digest_of(data: bytes) -> str:
    """The OCI digest of bytes."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def check_digest(text: object) -> str:
    """Return `text` if it is a SHA-256 digest.

    Raises:
        ValueError: It is not; other algorithms are not used here.
    """
    if not isinstance(text, str) or not _DIGEST.fullmatch(text):
        raise ValueError(f"{str(text)[:80]!r} is not a sha256 digest")
    return text


def _descriptor(value: Any) -> Descriptor:
    size = value["size"]
    if type(size) is not int or not 0 <= size < 2**53:
        raise ValueError(f"{str(size)[:80]!r} is not a size")
    data = value.get("data")
    try:
        inline = None if data is None else base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise ValueError("its data is not base64") from error
    return Descriptor(
        media_type=_text(value["mediaType"]),
        digest=check_digest(value["digest"]),
        size_bytes=size,
        artifact_type=_text(value.get("artifactType", "")),
        annotations=_annotations(value.get("annotations")),
        data=inline,
    )


def _annotations(value: Any) -> dict[str, str]:
    if value is None:
        return {}
    return {_text(key): _text(text) for key, text in value.items()}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{str(value)[:80]!r} is not text")
    return value
