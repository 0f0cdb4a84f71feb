"""Tables for people, of text that a package or a store may have brought: shown, never obeyed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


def make_table(columns: Sequence[str]) -> Table:
    """An empty table without lines."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def printable(text: str, style: str = "") -> Text:
    """Text without markup or control characters."""
    from rich.text import Text

    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return Text(shown, style=style)
