"""An `oci://` URL, and the repository and tags that a package has below it.

    oci://HOST[:PORT]/PREFIX

    <prefix>/<name>                          repository of a recipe
    :<variant>_<version>                     image of one version
    :<statement>_<place>                     statement; <place>: 32 hex digits for variant, version
    :<variant>_move-<hex>                    move, named by 40 hex digits of its SHA-256
    :<variant>_copies                        copies of what a variant lists
    :<variant>_<channel>.<card>              image that a channel means, for clusters that mount it
    <prefix>/registry:identity               identity of the registry

Each statement and each move has a tag of its own, so writers never meet. Neither a variant nor a
version has a `_`, and no channel has a dot, so each tag means one thing.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from pipeline.core.errors import Fault, RecipeError
from pipeline.registry.reference import check_part
from pipeline.registry.store import Place, is_statement_name
from pipeline.registry.stores.oci.urls import is_loopback

_MAX_REPOSITORY = 255
"""Characters, host included (distribution-spec 1.1, "Pulling manifests")."""
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_PART}(?:/{_PART})*")
_LONGEST_NAME = 64  # pipeline.registry.reference
_HUB, _HUB_API = "docker.io", "registry-1.docker.io"


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where a registry answers, and what of it is ours."""

    host: str  # as the user wrote it, with its port: the key of Docker's `config.json`
    api: str  # start of every URL, such as `https://host`
    prefix: str  # what our repositories start with: empty, or it ends in `/`

    def repository(self, name: str) -> str:
        return f"{self.prefix}{check_part('name', name)}"

    def name_of(self, repository: str) -> str | None:
        """The recipe that a repository is of; None if it is not ours."""
        if not repository.startswith(self.prefix):
            return None
        try:
            return check_part("name", repository.removeprefix(self.prefix))
        except RecipeError:
            return None


def parse_address(url: str) -> Address:
    """Read `oci://HOST[:PORT]/PREFIX`, without TLS for this machine, or a RecipeError."""
    parts = urlsplit(url)
    host, prefix, fault = parts.hostname or "", parts.path.strip("/"), ""
    netloc = f"[{host}]" if ":" in host else host
    try:
        netloc += "" if parts.port is None else f":{parts.port}"
    except ValueError as error:
        fault = f"{url!r} is not an OCI registry: {error}"
    if "@" in parts.netloc:
        fault = (
            "an oci:// URL has no user and no password: set ENGINESMITH_OCI_USERNAME and "
            "ENGINESMITH_OCI_PASSWORD, or use `docker login`"
        )
    elif not fault and (parts.scheme != "oci" or not host or parts.query or parts.fragment):
        fault = f"{url!r} is not an OCI registry; write oci://HOST[:PORT]/REPOSITORY"
    elif prefix and not _REPOSITORY.fullmatch(prefix):
        fault = (
            f"{prefix!r} is no OCI repository: lowercase letters and digits, joined by dots, "
            "dashes, underscores or slashes"
        )
    elif len(f"{netloc}/{prefix}/") + _LONGEST_NAME > _MAX_REPOSITORY:
        fault = f"{url!r} is too long: host and repository have {_MAX_REPOSITORY} characters"
    if fault:
        raise RecipeError([Fault("registry", fault)])
    scheme = "http" if is_loopback(host) else "https"
    return Address(
        host=netloc,
        api=f"{scheme}://{_HUB_API if netloc == _HUB else netloc}",
        prefix=f"{prefix}/" if prefix else "",
    )


def version_tag(place: Place) -> str:
    """The tag of a version's image; at most 128 characters by the grammar of references."""
    return f"{check_part('variant', place.variant)}_{check_part('version', place.version)}"


def parse_version_tag(name: str, tag: str) -> Place | None:
    """The version of a recipe that an image's tag is of; None if the tag is something else."""
    variant, _, version = tag.partition("_")
    place = Place(name=name, variant=variant, version=version)
    try:
        return place if version_tag(place) == tag else None
    except RecipeError:
        return None


def statement_tag(place: Place, statement: str) -> str:
    """The tag of a statement about a version."""
    return f"{statement}_{hashlib.sha256(version_tag(place).encode()).hexdigest()[:32]}"


def parse_statement_tag(tag: str) -> tuple[str, str] | None:
    """Name of a statement, and the end of the tags of all statements about its version."""
    statement, _, place = tag.partition("_")
    return (statement, place) if is_statement_name(statement) else None


def move_tag(variant: str, digest: str) -> str:
    """The tag of a move by its SHA-256 (hex); without it, what they all start with."""
    return f"{check_part('variant', variant)}_move-{digest[:40]}"


def parse_move_tag(tag: str) -> tuple[str, str] | None:
    """Variant, and the digits in the name of a move; None if the tag is something else."""
    variant, _, move = tag.partition("_move-")
    return (variant, move) if re.fullmatch("[0-9a-f]{40}", move) else None


def copies_tag(variant: str) -> str:
    """The tag of the copies of what a variant lists."""
    return f"{check_part('variant', variant)}_copies"
