"""The JSON documents of an OCI registry: descriptors, manifests, lists; read with suspicion."""

from __future__ import annotations

import base64
import hashlib
from typing import Annotated, Any, TypeVar

import rfc8785
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

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

_Digest = Annotated[str, Field(pattern="^sha256:[0-9a-f]{64}$")]


class _Value(BaseModel):
    model_config = ConfigDict(
        frozen=True, strict=True, alias_generator=to_camel, populate_by_name=True
    )

    def to_json(self) -> dict[str, Any]:
        """As image-spec 1.1 writes it."""
        return self.model_dump(by_alias=True, exclude_none=True)


class Descriptor(_Value):
    """Names bytes by their digest.

    Attributes:
        media_type: Of the bytes.
        digest: `sha256:` and 64 hex digits.
        size: Of the bytes.
        artifact_type: Of the manifest that it names.
        annotations: Text about it.
        data: The bytes themselves in base64, when they travel with it; not yet compared.
    """

    media_type: str
    digest: _Digest
    size: Annotated[int, Field(ge=0, lt=2**53)]
    artifact_type: str | None = None
    annotations: dict[str, str] | None = None
    data: str | None = None

    def annotation(self, key: str) -> str:
        """The text about it under a key; empty if there is none."""
        return (self.annotations or {}).get(key, "")


class Manifest(_Value):
    """An image or an artifact."""

    artifact_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]
    subject: Descriptor | None = None
    annotations: dict[str, str] | None = None

    def document(self) -> bytes:
        """Its bytes; the same for the same content."""
        return rfc8785.dumps({"schemaVersion": 2, "mediaType": MANIFEST_TYPE, **self.to_json()})


class Listing(_Value):
    """One page of manifests, tags or repositories."""

    manifests: list[Descriptor] | None = None
    tags: list[str] | None = None
    repositories: list[str] | None = None


_Parsed = TypeVar("_Parsed", bound=BaseModel)


def parse(kind: type[_Parsed], data: bytes, origin: str) -> _Parsed:
    """Read a document.

    Raises:
        CorruptError: It is none of this kind; unknown keys are left out.
    """
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(step) for step in fault["loc"])
        raise CorruptError(
            f"{origin} is not an OCI {kind.__name__.lower()}: {where} {fault['msg']}"
        ) from error


def describe(
    data: bytes, media_type: str, title: str | None = None, *, inline: bool = False
) -> Descriptor:
    """Name bytes that we hold.

    Args:
        data: The bytes.
        media_type: Of them.
        title: The file name that they have in an artifact.
        inline: They travel in the descriptor, so that reading them needs no further request
            (image-spec 1.1, "Embedded Content").
    """
    return Descriptor(
        media_type=media_type,
        digest=digest_of(data),
        size=len(data),
        annotations=None if title is None else {TITLE: title},
        data=base64.b64encode(data).decode() if inline else None,
    )


def digest_of(data: bytes) -> str:
    """The OCI digest of bytes."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
