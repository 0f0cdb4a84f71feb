"""English prose that every Python carries: the help topics of the standard library.

`pydoc_data.topics` is the language reference, about 460 kB of technical English under the PSF
licence; no download. Whole topics go into three disjoint parts by a rule that looks at names only,
fixed before any result was seen: topics that share a run of 13 words stay together (some repeat
sections of others), and such a group goes where the SHA-256 of its first name sends it.

*calibrate* is what amax is measured on, *tune* is what choices such as `keep_16bit` may be made
on, *judge* is for the verdict alone. The text differs between Python versions; its digest is part
of the build key.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from typing import Literal

from pydantic.dataclasses import dataclass

from pipeline.core.settings import STRICT
from pipeline.sources.text.corpus import ngrams

Part = Literal["calibrate", "tune", "judge"]
PARTS: tuple[Part, ...] = ("calibrate", "tune", "judge")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PydocTopics:
    """One part of the standard library's help topics."""

    part: Part

    @property
    def origin(self) -> str:
        return f"pydoc_data.topics/{self.part}"

    def documents(self) -> tuple[str, ...]:
        from pydoc_data.topics import topics

        groups = related_topics(topics)
        return tuple(
            topics[name] for group in groups if part_of(group) == self.part for name in group
        )


def related_topics(topics: dict[str, str]) -> list[tuple[str, ...]]:
    """Groups of topics that share text, each sorted by name, in order of their first names."""
    parent = {name: name for name in topics}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    first_owner: dict[bytes, str] = {}
    for name in sorted(topics):
        for run in ngrams(topics[name]):
            owner = first_owner.setdefault(run, name)
            parent[root(name)] = root(owner)
    groups: dict[str, list[str]] = defaultdict(list)
    for name in sorted(topics):
        groups[root(name)].append(name)
    return sorted(tuple(group) for group in groups.values())


def part_of(group: tuple[str, ...]) -> Part:
    """The part of a group: SHA-256 of its first name, modulo three."""
    return PARTS[int(hashlib.sha256(group[0].encode()).hexdigest(), 16) % len(PARTS)]


KIND = PydocTopics
