"""Plots as inline SVG that follow the page's colours, light and dark.

matplotlib draws with stand-in colours; each is then replaced by the style sheet's variable.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _MUTED, _LINE, _ACCENT, _SECOND, _WARN, _PANEL = (f"#0a0b0{digit}" for digit in range(1, 8))
_VARIABLES = {
    _INK: "--ink",
    _MUTED: "--muted",
    _LINE: "--line",
    _ACCENT: "--accent",
    _SECOND: "--second",
    _WARN: "--warn",
    _PANEL: "--panel",
}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be selected, and takes the page's font
    "text.usetex": False,
    "text.parse_math": False,  # a workload may be called `$x$`
    "font.size": 9.5,
    "text.color": _INK,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _LINE,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _LINE,
    "grid.linewidth": 0.7,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "axes.labelsize": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}
LOOKS: dict[str, dict[str, Any]] = {
    "engine": {"color": _ACCENT, "marker": "o", "zorder": 4},
    "baseline": {"color": _SECOND, "marker": "s", "zorder": 3},
    "ceiling": {"color": _MUTED, "linestyle": "--", "zorder": 2},
    "target": {"color": _WARN, "linestyle": "none", "marker": "_", "markersize": 16,
               "markeredgewidth": 2.5, "zorder": 5},
}  # fmt: skip
"""How each kind of series is drawn."""


Plot = tuple[str, str]
"""Caption, and SVG that is markup."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points of one colour: `look` is a key of `LOOKS`; `raw` holds single runs behind them."""

    label: str
    look: str
    x: Sequence[float]
    y: Sequence[float]
    raw: Sequence[tuple[float, float]] = field(default=())


def installed() -> bool:
    """Whether plots can be drawn here."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def throughput_chart(series: Sequence[Series], caption: str) -> Plot:
    """Output tokens per second over batch, both axes logarithmic."""

    def draw(figure: Figure) -> None:
        from matplotlib.ticker import FuncFormatter, NullLocator

        axes = figure.subplots()
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for one in series:
            axes.plot(one.x, one.y, label=one.label, **LOOKS[one.look])
            if one.raw:
                at, rates = zip(*one.raw, strict=True)
                axes.scatter(at, rates, s=9, color=LOOKS[one.look]["color"], alpha=0.35)
        batches = sorted({x for one in series for x in one.x})
        axes.set_xticks(batches, [f"{batch:g}" for batch in batches])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(_plain))
        axes.yaxis.set_minor_formatter(FuncFormatter(_few_minor_labels(axes)))
        axes.tick_params(which="minor", labelcolor=_MUTED, color=_LINE)
        axes.set_xlabel("batch")
        axes.set_ylabel("output tokens per second")
        axes.legend(loc="best")

    return _svg(draw, caption, height=3.0)


def _few_minor_labels(axes: Axes) -> Callable[[float, int], str]:
    """Labels at 2 and 5 where the axis spans so little that the powers of ten are too few."""

    def label(value: float, _: int) -> str:
        low, high = axes.get_ylim()
        digit = f"{value:e}"[0]
        return _plain(value, 0) if high / low < 100 and digit in "25" else ""

    return label


def _plain(value: float, _: int) -> str:
    """A tick as people write it: 10,000 and not 1e+04."""
    return f"{value:,.0f}" if abs(value) >= 10 else f"{value:g}"


def latency_chart(rows: Sequence[tuple[str, Sequence[float]]], caption: str) -> Plot:
    """p50, p90 and p99 of each workload in milliseconds, as a line with three marks."""

    def draw(figure: Figure) -> None:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

        axes = figure.subplots()
        axes.set_xscale("log")
        for place, (_, values) in enumerate(rows):
            axes.plot(values, [place] * 3, color=_ACCENT, alpha=0.45, linewidth=3)
        for index, (label, marker) in enumerate((("p50", "o"), ("p90", "D"), ("p99", "|"))):
            axes.plot(
                [values[index] for _, values in rows], range(len(rows)), linestyle="none",
                marker=marker, color=_ACCENT, label=label, markersize=(6, 5, 13)[index],
                markeredgewidth=(1, 1, 2.5)[index],
            )  # fmt: skip
        axes.set_yticks(range(len(rows)), [row[0] for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(_plain))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("milliseconds")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)

    return _svg(draw, caption, height=1.5 + 0.34 * len(rows))


def time_chart(
    minutes: Sequence[float],
    values: Sequence[float],
    caption: str,
    unit: str,
    *,
    shaded: Sequence[tuple[float, float]] = (),
    levels: Sequence[float] = (),
    least_span: float = 1.0,
) -> Plot:
    """One figure over time.

    Args:
        minutes: When.
        values: What.
        caption: Heading.
        unit: Label of the axis.
        shaded: Windows that are compared, in minutes.
        levels: Their medians, one for each window.
        least_span: The axis goes at least this far, so that noise does not look like a trend.
    """

    def draw(figure: Figure) -> None:
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        axes = figure.subplots()
        axes.plot(minutes, values, color=_ACCENT, linewidth=1.2)
        for (start, end), level in zip(shaded, levels, strict=True):
            axes.axvspan(start, end, color=_WARN, alpha=0.12, linewidth=0)
            axes.plot([start, end], [level, level], color=_WARN, linewidth=2.4)
        # From zero, so that noise does not look like a fall.
        low, high = min(values, default=0), max(values, default=0)
        axes.set_ylim(1.12 * min(low, 0), 1.12 * max(high, least_span))
        axes.set_xlim(0, max([*minutes, 0.1]))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_formatter(FuncFormatter(_plain))
        axes.set_xlabel("minutes")
        axes.set_ylabel(unit)

    return _svg(draw, caption, height=2.4)


def _svg(draw: Callable[[Figure], None], caption: str, *, height: float) -> Plot:
    """A figure of the page; `height` in inches, the width is 4.4."""
    import matplotlib as mpl
    from markupsafe import Markup
    from matplotlib.figure import Figure

    # The salt names the ids inside the SVG: the same report gives the same page.
    style: Any = {**_STYLE, "svg.hashsalt": caption}
    with mpl.rc_context(style):
        figure = Figure(figsize=(4.4, height), layout="constrained", facecolor="none")
        draw(figure)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        with warnings.catch_warnings():
            # The reader's browser has the fonts; here they are only needed for widths.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # Ids are unique in a page, not only in a figure.
    prefix = re.sub(r"[^a-z0-9]+", "-", caption.lower())
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'href="#', f'href="#{prefix}-', text)
    text = re.sub(r"url\(#", f"url(#{prefix}-", text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    svg = Markup('<svg role="img" aria-label="{}" ').format(caption)
    return caption, svg + Markup(text.removeprefix("<svg "))
