"""The report's plots as inline SVG that follow the page's colours, light and dark.

matplotlib is imported here and nowhere else. It draws with stand-in colours; each is then replaced
by the style sheet's variable.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NAMES = ("ink", "muted", "line", "accent", "warn")
_VARIABLES = {f"#0a0b0{digit}": f"--{name}" for digit, name in enumerate(_NAMES, 1)}
_INK, _MUTED, _LINE, _ACCENT, _WARN = _VARIABLES
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
    "ceiling of the card": {"color": _MUTED, "linestyle": "--", "zorder": 2},
    "target": {"color": _WARN, "linestyle": "none", "marker": "_", "markersize": 16,
               "markeredgewidth": 2.5, "zorder": 5},
}  # fmt: skip
"""How each series is drawn, by its label."""
Plot = tuple[str, str]
"""Caption, and SVG that is markup."""
Entry = Mapping[str, Any]
LATENCIES = {
    "ttft_ms": "time to first token",
    "itl_ms": "between tokens",
    "request_latency_ms": "whole request",
}
"""Figure of a workload -> its name for people."""
PERCENTILES = ("p50", "p90", "p99")


def throughput_plots(entries: Sequence[Entry], planned: Sequence[Entry]) -> list[Plot]:
    """Rates over batch, measured and planned, for each pair of lengths with two batches."""
    # What arrives at a rate is not faster with a larger batch.
    entries = [entry for entry in entries if not entry.get("request_rate")]
    plots = []
    for isl, osl in sorted({(load["isl"], load["osl"]) for load in (*entries, *planned)}):
        mine, plan = (
            sorted(
                (load for load in loads if (load["isl"], load["osl"]) == (isl, osl)),
                key=lambda load: int(load["batch"]),
            )
            for loads in (entries, planned)
        )
        if len({load["batch"] for load in (*mine, *plan)}) < 2:
            continue
        wanted = [load for load in plan if load["target"] is not None]
        series = [
            ("engine", mine, "output_tokens_per_s"),
            ("ceiling of the card", plan, "ceiling"),
            ("target", wanted, "target"),
        ]
        caption = f"Throughput over batch, {isl} prompt and {osl} output tokens"
        plots.append(_throughput_plot([one for one in series if one[1]], caption))
    return plots


def _throughput_plot(series: Sequence[tuple[str, Sequence[Entry], str]], caption: str) -> Plot:
    """Lines over batch, both axes logarithmic: key of `LOOKS`, workloads, key of theirs."""

    def draw(figure: Figure) -> None:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

        axes = figure.subplots()
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for label, loads, key in series:
            x = [load["batch"] for load in loads]
            axes.plot(x, [load[key] for load in loads], label=label, **LOOKS[label])
            # Single runs behind the medians.
            raw = [(load["batch"], rate) for load in loads for rate in load.get("samples", ())]
            if raw:
                at, rates = zip(*raw, strict=True)
                axes.scatter(at, rates, s=9, color=LOOKS[label]["color"], alpha=0.35)
        batches = sorted({load["batch"] for _, loads, _ in series for load in loads})
        axes.set_xticks(batches, [f"{batch:g}" for batch in batches])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(_plain))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("batch")
        axes.set_ylabel("output tokens per second")
        axes.legend(loc="best")

    return _svg(draw, caption, height=3.0)


def _plain(value: float, _: int) -> str:
    """A tick as people write it: 10,000 and not 1e+04."""
    return f"{value:,.0f}" if abs(value) >= 10 else f"{value:g}"


def percentiles(entries: Sequence[Entry], key: str) -> list[tuple[str, list[float]]]:
    """Workload, and p50, p90 and p99 of one of `LATENCIES`, where all three are known."""
    return [
        (str(entry["workload"])[:24], [float(entry[key][p]) for p in PERCENTILES])
        for entry in entries
        if isinstance(entry.get(key), Mapping) and entry[key].keys() >= set(PERCENTILES)
    ]


def latency_plots(entries: Sequence[Entry]) -> list[Plot]:
    """Percentiles of each latency that has some."""
    known = {name: percentiles(entries, key) for key, name in LATENCIES.items()}
    return [_latency_plot(rows, name.capitalize()) for name, rows in known.items() if rows]


def _latency_plot(rows: Sequence[tuple[str, Sequence[float]]], caption: str) -> Plot:
    """p50, p90 and p99 of each workload in milliseconds, as a line with three marks."""

    def draw(figure: Figure) -> None:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

        axes = figure.subplots()
        axes.set_xscale("log")
        for place, (_, values) in enumerate(rows):
            axes.plot(values, [place] * 3, color=_ACCENT, alpha=0.45, linewidth=3)
        for index, (label, marker) in enumerate(zip(PERCENTILES, "oD|", strict=True)):
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


def sustained_plots(run: Entry | None) -> list[Plot]:
    """Rate, memory, temperature and power of a sustained run, as far as they were sampled."""
    if not run or not run["samples"]:
        return []
    samples, limits, figures = run["samples"], run["limits"], run.get("figures")
    minutes = [sample["t_s"] / 60 for sample in samples]
    windows = []
    if figures:
        start = min(one for one in minutes if one >= limits["warm_up_s"] / 60)
        end, width = minutes[-1], limits["window_s"] / 60
        windows = [
            (start, start + width, figures["first_tokens_per_s"]),
            (end - width, end, figures["last_tokens_per_s"]),
        ]
    plots = []
    for key, caption, unit in (
        ("output_tokens_per_s", "Throughput over time", "output tokens per second"),
        ("memory_bytes", "Device memory against its start", "MiB"),
        ("temperature_c", "Temperature over time", "\u00b0C"),
        ("power_w", "Power over time", "W"),
    ):
        values, least, shaded = [sample.get(key) for sample in samples], 1.0, windows
        if None in values:
            continue
        if key == "memory_bytes":
            # The change: a leak of megabytes cannot be seen beside gigabytes of weights.
            values = [(value - values[0]) / 2**20 for value in values]
            least = limits["max_memory_growth_bytes"] / 2**20
        if key != "output_tokens_per_s":
            shaded = []
        plots.append(_time_plot(minutes, values, caption, unit, shaded, least))
    return plots


def _time_plot(
    minutes: Sequence[float],
    values: Sequence[float],
    caption: str,
    unit: str,
    windows: Sequence[tuple[float, float, float]],
    least_span: float,
) -> Plot:
    """One figure over time; `windows` are compared: begin and end in minutes, and medians.

    The axis goes to `least_span` at least, so that noise does not look like a trend.
    """

    def draw(figure: Figure) -> None:
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        axes = figure.subplots()
        axes.plot(minutes, values, color=_ACCENT, linewidth=1.2)
        for start, end, level in windows:
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
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    svg = Markup('<svg role="img" aria-label="{}" ').format(caption)
    return caption, svg + Markup(text.removeprefix("<svg "))
