"""Two plots of a race, drawn by matplotlib: throughput over batch, and the ratios.

For `race.html`, which is light or dark as its reader likes, they are drawn in stand-in colours that
are then replaced by the style sheet's variables; the files beside it are drawn on white.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.acceptance.race.contenders import OURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Palette:
    """Colours that depend on what is behind them."""

    ink: str
    muted: str
    line: str
    ours: str


STAND_IN = Palette(ink="#0a0b01", muted="#0a0b02", line="#0a0b03", ours="#0a0b04")
VARIABLES = Palette(
    ink="var(--ink)", muted="var(--muted)", line="var(--line)", ours="var(--accent)"
)
"""Of the reports' style sheet (pipeline/acceptance/page/page.css)."""
ON_WHITE = Palette(ink="#1b1d20", muted="#5f646c", line="#dfe0dd", ours="#2a5bd0")
_PEERS = ("#c2701c", "#2f8f5b", "#9a4fb5", "#b23a48", "#5d7a8c")
"""Of peers, in their order; seen on white and on near-black."""
_MARKERS = "sD^vP"
_SCALE = 3.0
"""Ratios above it are not drawn beside those between one runtime's variants."""
Draw = Callable[["Figure", Palette], None]


def throughput_figure(report: Mapping[str, Any]) -> Draw:
    """Output tokens per second over batch, both axes logarithmic, with the card's ceiling."""

    def draw(figure: Figure, palette: Palette) -> None:
        from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

        axes = figure.subplots()
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for index, (name, contender) in enumerate(report["contenders"].items()):
            rows = [row for row in report["throughput"] if row["contender"] == name]
            if rows:
                axes.plot(
                    [row["batch"] for row in rows],
                    [row["output_tokens_per_s"] for row in rows],
                    label=contender["label"],
                    **look(name, index, palette),
                )
        if report["ceilings"]:
            axes.plot(
                [row["batch"] for row in report["ceilings"]],
                [row["output_tokens_per_s"] for row in report["ceilings"]],
                label="ceiling of the card for our artifact",
                color=palette.muted,
                linestyle="--",
            )
        batches = [load["batch"] for load in report["workloads"]]
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("batch")
        axes.set_ylabel("output tokens per second")
        _legend_below(axes)

    return draw


def ratio_figure(report: Mapping[str, Any]) -> Draw:
    """Ours over each peer, median and interval, by workload; 1 is a draw."""

    def draw(figure: Figure, palette: Palette) -> None:
        axes = figure.subplots()
        names = [load["name"] for load in report["workloads"]]
        places = list(report["contenders"])
        pairs, _ = split_by_scale(report)
        axes.axhline(1.0, color=palette.ours, linewidth=1.2)
        width = 0.6 / max(len(pairs), 1)
        for number, pair in enumerate(pairs):
            style = look(pair["peer"], places.index(pair["peer"]), palette)
            label = report["contenders"][pair["peer"]]["label"]
            for row in pair["workloads"]:
                ratio = row["ratio"]
                at = names.index(row["workload"]) + (number + 0.5) * width - 0.3
                if ratio["low"] is not None:
                    ends = [ratio["low"], ratio["high"]]
                    axes.plot([at, at], ends, color=style["color"], linewidth=2.6, alpha=0.55)
                axes.plot([at], [ratio["median"]], label=label, **{**style, "linestyle": "none"})
                label = None  # once in the legend
        axes.set_xticks(range(len(names)), names)
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_ylabel("ours / peer")
        _legend_below(axes)

    return draw


def split_by_scale(
    report: Mapping[str, Any],
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Pairs that share one scale, and those whose ratio would press them flat."""
    pairs = [pair for pair in report["pairs"] if pair["workloads"]]
    near = [
        pair for pair in pairs if all(row["ratio"]["median"] <= _SCALE for row in pair["workloads"])
    ]
    shown = near or pairs
    return shown, [pair for pair in pairs if pair not in shown]


def _legend_below(axes: Axes) -> None:
    """A line for each series: labels are long, and a telephone is narrow."""
    axes.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.15), ncols=1)


def look(name: str, index: int, palette: Palette) -> dict[str, Any]:
    """How a contender is drawn; `index`: its place among all, ours first."""
    if name == OURS:
        return {"color": palette.ours, "marker": "o", "zorder": 4, "linewidth": 2.2}
    place = max(index - 1, 0) % len(_PEERS)
    return {"color": _PEERS[place], "marker": _MARKERS[place], "zorder": 3}


def inline_svg(draw: Draw, name: str) -> str:
    """The figure as one `<svg>` element of a page; `name` keeps its ids apart from another's."""
    text = svg(draw, name, STAND_IN)
    text = text[text.index("<svg") :]
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    for part, color in vars(STAND_IN).items():
        text = text.replace(color, getattr(VARIABLES, part))
    return text


def svg(draw: Draw, name: str, palette: Palette = ON_WHITE) -> str:
    """The figure as an SVG file."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    _save(draw, name, palette, buffer, format="svg", metadata=nothing)
    return buffer.getvalue()


def png(draw: Draw, name: str) -> bytes:
    """The figure on white, for documents."""
    buffer = io.BytesIO()
    _save(draw, name, ON_WHITE, buffer, format="png", dpi=160, facecolor="white")
    return buffer.getvalue()


def _save(draw: Draw, name: str, palette: Palette, buffer: Any, **how: Any) -> None:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # The salt names the ids inside the SVG: the same report gives the same file.
    style: Any = {**_style(palette), "svg.hashsalt": name}
    with mpl.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(5.6, 4.6), layout="constrained", facecolor="none")
        draw(figure, palette)
        figure.savefig(buffer, **how)


def _style(palette: Palette) -> dict[str, Any]:
    return {
        "svg.fonttype": "none",  # text stays text, in the page's font
        "text.parse_math": False,
        "font.size": 9.5,
        "text.color": palette.ink,
        "axes.labelcolor": palette.muted,
        "axes.edgecolor": palette.line,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": palette.line,
        "grid.linewidth": 0.7,
        "xtick.color": palette.line,
        "ytick.color": palette.line,
        "xtick.labelcolor": palette.muted,
        "ytick.labelcolor": palette.muted,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "axes.labelsize": 9,
        "lines.linewidth": 1.6,
        "lines.markersize": 5,
    }
