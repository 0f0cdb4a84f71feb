"""A page as plain values, and the template that draws it.

The template escapes whatever it prints; only plots and the style sheet, which are ours, are markup.
Names, answers and messages of a report come from models and configurations that are not trusted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

# Not allowed in HTML, or in UTF-8 at all: controls but tab and newline, and lone surrogates.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
Tone = Literal["good", "checked", "warn", "bad", "plain"]


@dataclass(frozen=True)
class Cell:
    """Text of a table; `small` stands below it, `tone` colours a word that stands for itself."""

    text: object
    small: str = ""
    tone: Tone | None = None


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of cells; all columns but the first `words` hold numbers."""

    headings: Sequence[str]
    rows: Sequence[Sequence[object]]
    words: int = 1
    kind: str = "table"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Names and values; those in `wide` take a whole line."""

    pairs: Sequence[tuple[str, object]]
    wide: Sequence[tuple[str, object]] = ()
    kind: str = "facts"


@dataclass(frozen=True, kw_only=True)
class Heading:
    """A heading within a section, with a sentence below it."""

    text: str
    small: str = ""
    kind: str = "heading"


@dataclass(frozen=True, kw_only=True)
class Bullets:
    """Lines, each perhaps with a word in colour before it."""

    items: Sequence[Cell]
    kind: str = "bullets"


@dataclass(frozen=True, kw_only=True)
class Charts:
    """Plots beside each other: caption and SVG, which is markup of `charts` and nothing else."""

    plots: Sequence[tuple[str, str]]
    kind: str = "charts"


@dataclass(frozen=True, kw_only=True)
class Details:
    """Blocks that open on demand."""

    summary: str
    blocks: Sequence[Block]
    kind: str = "details"


Block = Table | Facts | Heading | Bullets | Charts | Details


@dataclass(frozen=True, kw_only=True)
class Section:
    """A section of the page; `look` is a class of the style sheet."""

    title: str
    blocks: Sequence[Block]
    lead: str = ""
    look: str = ""


@dataclass(frozen=True, kw_only=True)
class Banner:
    """The first thing on the page: a word, what it means, and lines on what to do.

    Attributes:
        word: The verdict.
        tone: Its colour.
        meaning: A sentence.
        lines: Label and text; text in backquotes is code.
    """

    word: str
    tone: Tone
    meaning: str
    lines: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True, kw_only=True)
class Document:
    """A whole page.

    Attributes:
        title: Of the window.
        eyebrow: Small line above the name.
        name: Heading.
        subject: Reference or digest, as code.
        banner: The verdict.
        tiles: The few figures that come first: figure, and what it is.
        sections: All else.
        footer: Last line.
    """

    title: str
    eyebrow: str
    name: str
    subject: str
    banner: Banner
    sections: Sequence[Section]
    tiles: Sequence[tuple[str, str]] = ()
    footer: str = ""


def render(document: Document) -> str:
    """The page, complete, without any outside resource and without a script."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    here = files(__package__)
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_printable,
    )
    environment.tests["cell"] = lambda value: isinstance(value, Cell)
    template = environment.from_string(here.joinpath("page.html.j2").read_text())
    return template.render(page=document, style=Markup(here.joinpath("page.css").read_text()))


def _printable(value: Any) -> Any:
    """A value without characters that a page must not have; markup stays as it is."""
    if hasattr(value, "__html__"):
        return value
    return _UNPRINTABLE.sub("\ufffd", str(value))


def facts_of(values: Mapping[str, Any]) -> list[Block]:
    """A nested mapping as facts; mappings of like mappings become tables."""
    from pipeline.acceptance.page.words import shown, spoken

    blocks: list[Block] = []
    plain = [(spoken(k), shown(v)) for k, v in values.items() if not isinstance(v, Mapping)]
    if plain:
        blocks.append(Facts(pairs=plain))
    for key, value in values.items():
        if not isinstance(value, Mapping) or not value:
            continue
        blocks.append(Heading(text=spoken(key)))
        rows = list(value.values())
        if all(isinstance(row, Mapping) and row and row.keys() == rows[0].keys() for row in rows):
            headings = ["", *(spoken(column) for column in rows[0])]
            cells = [[spoken(n), *(shown(v) for v in row.values())] for n, row in value.items()]
            blocks.append(Table(headings=headings, rows=cells))
        else:
            blocks += facts_of(value)
    return blocks
