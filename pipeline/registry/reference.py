"""References: how people and scripts name a package.

    name[/variant]:version      smollm2/any-checkpoint-fp8:1.0-0123abcd-89ab45cd0123
    name[/variant]:channel      smollm2:candidate
    name[/variant]@sha256:hex   smollm2@sha256:9f86d0...
    name                        the same as name:stable

A version is `<recipe version>-<8 of build_key>-<12 of digest>`: it follows from the manifest, so it
has one content. It starts with a digit and a channel with a letter, so neither is taken for the
other. Every part is also a safe file name and fits an OCI repository name or tag.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.core.errors import Fault, RecipeError
from pipeline.core.published import Package, Reference

DEFAULT_CHANNEL = "stable"

Part = Literal["name", "variant", "recipe_version", "version", "channel", "card"]

_NAME = re.compile(r"[a-z0-9]+(?:[.-][a-z0-9]+)*")
_WORDS = "lowercase letters and digits, joined by single dots or dashes"
# part -> grammar, longest allowed, the grammar in words. An OCI tag holds 128 characters
# (distribution-spec 1.1, "Pulling manifests"): variant, a separator and version fit into one.
_GRAMMAR: dict[Part, tuple[re.Pattern[str], int, str]] = {
    "name": (_NAME, 64, _WORDS),
    "variant": (_NAME, 64, _WORDS),
    "recipe_version": (
        re.compile(r"[0-9][a-z0-9]*(?:[.-][a-z0-9]+)*"),
        41,
        f"a digit first, then {_WORDS}",
    ),
    "version": (
        re.compile(r"[0-9][a-z0-9]*(?:[.-][a-z0-9]+)*-[0-9a-f]{8}-[0-9a-f]{12}"),
        63,
        "<recipe version>-<8 hex digits of its build key>-<12 of its digest>",
    ),
    "channel": (
        re.compile(r"[a-z][a-z0-9]*(?:-[a-z0-9]+)*"),
        32,
        "a letter first, then lowercase letters and digits, joined by single dashes",
    ),
    "card": (
        re.compile(r"[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*"),
        64,
        "what NVML calls the card, spaces as dashes, such as NVIDIA-GeForce-RTX-4090",
    ),
}
_RESERVED = re.compile(r"(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\..*)?", re.IGNORECASE)
"""Device names of Windows, whatever follows the first dot (Microsoft, "Naming Files, Paths, and
Namespaces")."""
_DIGEST = re.compile(r"[0-9a-f]{64}")
_REFERENCE = re.compile(
    r"(?P<name>[^/:@]*)(?:/(?P<variant>[^/:@]*))?(?::(?P<tag>[^/:@]*)|@(?P<digest>[^/@]*))?"
)


@dataclass(frozen=True, kw_only=True)
class ParsedReference:
    """What a reference says; exactly one of `version`, `channel` and `digest` (hex) is set.

    Without a variant the choice among them is left open.
    """

    name: str
    variant: str | None = None
    version: str | None = None
    channel: str | None = None
    digest: str | None = None

    def __str__(self) -> str:
        what = self.name if self.variant is None else f"{self.name}/{self.variant}"
        tail = f":{self.version or self.channel}"
        return what + (tail if self.digest is None else f"@sha256:{self.digest}")


def parse_reference(text: str) -> ParsedReference:
    """Parse what a user typed; `parse_reference(str(parsed)) == parsed` for every result.

    A RecipeError names the part that is wrong.
    """
    match = _REFERENCE.fullmatch(text)
    if match is None or not text:
        raise _fault(
            f"{text!r} is not a reference; write name, name:channel, name/variant:version or "
            "name@sha256:digest, such as smollm2:candidate"
        )
    name = check_part("name", match["name"])
    variant = None if match["variant"] is None else check_part("variant", match["variant"])
    if (digest := match["digest"]) is not None:
        hexadecimal = digest.removeprefix("sha256:")
        if hexadecimal == digest:
            raise _fault(f"@{digest} in {text!r} is not a digest; write @sha256:...")
        return ParsedReference(name=name, variant=variant, digest=check_digest(hexadecimal))
    tag = DEFAULT_CHANNEL if match["tag"] is None else match["tag"]
    if tag[:1].isdigit():
        return ParsedReference(name=name, variant=variant, version=check_part("version", tag))
    return ParsedReference(name=name, variant=variant, channel=check_part("channel", tag))


def check_part(part: Part, text: str) -> str:
    """Return `text` if it is a valid `part` of a reference, else a RecipeError with what is."""
    (pattern, longest, words), called = _GRAMMAR[part], part.replace("_", " ")
    if is_device_name(text):
        raise _fault(f"{text[:longest]!r} is not a {called}: Windows keeps it for a device")
    if len(text) <= longest and pattern.fullmatch(text):
        return text
    shown = text if len(text) <= longest else f"{text[:longest]}..."
    message = f"{shown!r} is not a {called}: {words}; at most {longest} characters"
    lowered = text.lower().replace("_", "-")
    if lowered != text and len(text) <= longest and pattern.fullmatch(lowered):
        message += f"; did you mean {lowered}?"
    raise _fault(message)


def check_digest(text: str) -> str:
    """Return `text` if it is a SHA-256 in hex, else raise a RecipeError."""
    if not _DIGEST.fullmatch(text):
        raise _fault(f"{text[:80]!r} is not a digest: 64 lowercase hex digits")
    return text


def is_device_name(text: str) -> bool:
    """Whether Windows takes a file name for a device."""
    return _RESERVED.fullmatch(text) is not None


def derive_version(manifest: Mapping[str, Any], digest: str) -> str:
    """The version of a package: what its manifest says, and the digest of the manifest."""
    return f"{manifest['recipe_version']}-{manifest['build_key'][:8]}-{digest[:12]}"


def reference_of(package: Package) -> Reference:
    """The full reference of a package."""
    return Reference(
        name=str(package.manifest["name"]),
        variant=str(package.manifest["variant"]),
        version=derive_version(package.manifest, package.digest),
        digest=package.digest,
    )


def _fault(message: str) -> RecipeError:
    return RecipeError([Fault("", message)])
