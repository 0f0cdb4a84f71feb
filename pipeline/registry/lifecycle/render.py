"""Tables of channels and of what a collection would remove, for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.registry.lifecycle.command import Shown
from pipeline.registry.lifecycle.gc import Fate

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


def render_channels(channels: Sequence[Shown], *, history: bool) -> Table:
    """One line per channel, or per move, newest first."""
    table = _table("channel", "card", "package", "move", "by", "at", "why")
    for one in channels:
        moves = list(reversed(one.log.moves)) if one.log else []
        for move in moves if history else moves[:1]:
            table.add_row(
                *map(
                    _text,
                    (
                        one.channel,
                        one.card,
                        str(move.reference),
                        str(move.seq),
                        f"{move.actor} ({move.signer})",
                        move.at,
                        move.reason,
                    ),
                )
            )
        if not moves:
            table.add_row(_text(one.channel), _text(one.card), _text(f"{one.where}: ?", "red"))
    return table


def render_fates(fates: Sequence[Fate]) -> Table:
    """One line per version: what goes, what stays, and why."""
    from rich.filesize import decimal

    table = _table("", "package", "size", "why")
    for fate in sorted(fates, key=lambda fate: (not fate.remove, fate.place)):
        table.add_row(
            _text("remove" if fate.remove else "keep", "yellow" if fate.remove else ""),
            _text(str(fate.place)),
            _text("?" if fate.size_bytes is None else decimal(fate.size_bytes)),
            _text(fate.why),
        )
    return table


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _text(text: str, style: str = "") -> Text:
    """Text that a package or a store may have brought: shown, never obeyed."""
    from rich.text import Text

    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return Text(shown, style=style)
