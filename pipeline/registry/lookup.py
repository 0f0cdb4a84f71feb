"""Which package a reference means, among those that there are; pure.

Explains itself when there is none, or more than one.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.core.errors import Fault, NotFoundError, RecipeError
from pipeline.registry.reference import ParsedReference
from pipeline.registry.statements import Pointer


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A published version; `digest` is what its manifest must have, None where nothing says so."""

    variant: str
    version: str
    digest: str | None = None


@dataclass(frozen=True, kw_only=True)
class Shelf:
    """What a registry holds under one name.

    Attributes:
        name: The name.
        versions: Variant -> its versions.
        pointers: Channels of all variants and cards.
    """

    name: str
    versions: Mapping[str, Sequence[str]]
    pointers: Sequence[Pointer]


def choose(wanted: ParsedReference, shelf: Shelf, card: str | None = None) -> Choice:
    """The one version that a reference by version or channel means.

    Args:
        wanted: The reference; not one by digest.
        shelf: Everything under its name.
        card: Only the channels of this card count; None for all.

    Raises:
        NotFoundError: None; says what there is.
        RecipeError: Several; lists them.
    """
    if wanted.variant is not None and wanted.variant not in shelf.versions:
        raise NotFoundError(
            f"{shelf.name} has no variant {wanted.variant}; "
            f"it has {_listed(sorted(shelf.versions))}"
        )
    variants = [wanted.variant] if wanted.variant is not None else sorted(shelf.versions)
    if wanted.version is not None:
        choices = {
            Choice(variant=variant, version=wanted.version): f"{shelf.name}/{variant}:"
            f"{wanted.version}"
            for variant in variants
            if wanted.version in shelf.versions[variant]
        }
    else:
        choices = {
            Choice(
                variant=pointer.reference.variant,
                version=pointer.reference.version,
                digest=pointer.reference.digest,
            ): f"{pointer.reference} ({pointer.card})"
            for pointer in shelf.pointers
            if pointer.channel == wanted.channel
            and pointer.reference.variant in variants
            and card in {None, pointer.card}
        }
    if len(choices) > 1:
        raise RecipeError(
            [Fault("", f"{wanted} is ambiguous: {_listed(sorted(choices.values()))}; specify one")]
        )
    if not choices:
        raise NotFoundError(_nothing(wanted, shelf, variants, card))
    return next(iter(choices))


def no_such_name(name: str, names: Sequence[str], where: str) -> NotFoundError:
    """The error for a name that is not there; offers a near one."""
    if close := difflib.get_close_matches(name, names, n=3):
        hint = f"did you mean {_listed(close)}?"
    elif names:
        hint = f"it has {_listed(sorted(names))}"
    else:
        hint = f"it is empty; make one with `make engine MODEL={name}`"
    return NotFoundError(f"{where} has no {name}; {hint}")


def _nothing(
    wanted: ParsedReference, shelf: Shelf, variants: Sequence[str], card: str | None
) -> str:
    versions = [
        f"{shelf.name}/{variant}:{version}"
        for variant in variants
        for version in shelf.versions[variant]
    ]
    if wanted.version is not None:
        close = difflib.get_close_matches(str(wanted), versions, n=3)
        return f"there is no {wanted}; there is {_listed(close or versions)}"
    channels = sorted(
        {
            f"{wanted.what}:{pointer.channel}"
            for pointer in shelf.pointers
            if pointer.reference.variant in variants and card in {None, pointer.card}
        }
    )
    for_card = f" for {card}" if card else ""
    return f"there is no {wanted}{for_card}; there is {_listed(channels or versions)}"


def _listed(items: Sequence[str], most: int = 8) -> str:
    shown = ", ".join(items[:most]) or "nothing"
    return shown if len(items) <= most else f"{shown} and {len(items) - most} more"
