"""The page's sections on what was timed: speed, targets, latency, sustained run."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.acceptance.page import charts
from pipeline.acceptance.page.charts import Series
from pipeline.acceptance.page.document import Block, Cell, Charts, Facts, Heading, Section, Table
from pipeline.acceptance.page.words import DASH, mebibytes, number, percent
from pipeline.acceptance.speed import MIN_ACHIEVED_SHARE

Entry = Mapping[str, Any]

_LATENCIES = {
    "ttft_ms": "time to first token",
    "itl_ms": "between tokens",
    "request_latency_ms": "whole request",
}
_PERCENTILES = ("p50", "p90", "p99")
_COSTS = (
    ("peak_memory_bytes", "peak memory, GiB", 2**30),
    ("mean_power_w", "power, W", 1),
    ("joules_per_token", "J per token", 1),
)


def mark(kept: bool | None) -> Cell:
    """Whether a limit is kept, in a word; colour only repeats it."""
    if kept is None:
        return Cell(DASH)
    return Cell("met" if kept else "missed", tone="good" if kept else "bad")


def speed(report: Entry) -> Section | None:
    """Median and spread of every workload."""
    entries: Sequence[Entry] = report["speed"]
    if not entries:
        return None
    rows = [
        (
            _workload(entry["workload"], entry),
            Cell(number(entry["output_tokens_per_s"]), small=_spread(entry.get("samples", ()))),
            *_required(entry),
        )
        for entry in entries
    ]
    device = report["conditions"].get("card") or report["conditions"]["device"]
    lead = (
        f"Measured on {device}. Output tokens per second of the whole batch, prefill included: the "
        "median of all runs, and how far the slowest and the fastest lie from it."
    )
    if not _on_card(report):
        lead += f" It says nothing about the speed on {report['card']}."
    blocks: list[Block] = [
        Table(headings=("workload", "tokens/s", "required", "result"), rows=rows),
        *_peers(entries),
        *_request_rates(entries),
        *_costs(entries),
        *(() if _on_card(report) else _throughput_charts(entries, {})),
    ]
    return Section(title="Speed", blocks=blocks, lead=lead)


def _peers(entries: Sequence[Entry]) -> list[Block]:
    """What ran beside the engine, and how many times as fast the engine was."""
    rows = [
        (
            peer["label"],
            entry["workload"],
            Cell(number(peer["output_tokens_per_s"]), small=_spread(peer.get("samples", ()))),
            Cell(number(peer["ratio"]["median"]), small=_interval(peer["ratio"])),
        )
        for entry in entries
        for peer in entry.get("peers", {}).values()
    ]
    small = (
        "Loaded beside the engine, taking turns with it; the ratio is taken in each round. Its "
        "median over the rounds, and the 95 % bootstrap interval of that."
    )
    table = Table(headings=("peer", "workload", "tokens/s", "engine / peer"), rows=rows, words=2)
    return [Heading(text="Peers", small=small), table] if rows else []


def _interval(ratio: Entry) -> str:
    if ratio["low"] is None:
        return f"{ratio['rounds']} rounds, no interval"
    return f"{number(ratio['low'])} to {number(ratio['high'])}"


def _request_rates(entries: Sequence[Entry]) -> list[Block]:
    """What arrived against what was answered, where requests arrive at a rate."""
    rows = []
    for entry in entries:
        if rate := entry.get("request_rate"):
            asked, achieved = float(rate["asked"]), float(rate["achieved"])
            kept = mark(achieved >= MIN_ACHIEVED_SHARE * asked)
            workload = _workload(entry["workload"], entry)
            rows.append((workload, number(asked), number(achieved), kept))
    small = (
        "Requests a second. They arrive whether or not the others have been answered, and times "
        f"count from the arrival; {MIN_ACHIEVED_SHARE:.0%} must be kept up with."
    )
    headings = ("workload", "arrive", "answered", "result")
    table = Table(headings=headings, rows=rows)
    return [Heading(text="Request rate", small=small), table] if rows else []


def _costs(entries: Sequence[Entry]) -> list[Block]:
    """Memory and energy, where they were measured."""
    known = [cost for cost in _COSTS if any(entry.get(cost[0]) is not None for entry in entries)]
    rows = [
        (entry["workload"], *(number(_scaled(entry.get(key), scale)) for key, _, scale in known))
        for entry in entries
    ]
    headings = ("workload", *(name for _, name, _ in known))
    table = Table(headings=headings, rows=rows)
    return [Heading(text="Memory and energy"), table] if known else []


def targets(report: Entry, plan: Entry) -> Section | None:
    """What the recipe wants of the card, what the card allows, and what was reached."""
    planned: Sequence[Entry] = plan.get("workloads", ())
    on_card = _on_card(report)
    if not planned:
        plots = _throughput_charts(report["speed"], {}) if on_card else []
        return Section(title="Throughput over batch", blocks=plots) if plots else None
    rows = []
    for load in planned:
        entry = _entry_of(report, load) if on_card else None
        rate = entry["output_tokens_per_s"] if entry else None
        target = load["target"]
        kept = None if rate is None or target is None else bool(rate >= target)
        rows.append((
            _workload(load["name"], load), number(target),
            "not run" if rate is None else number(rate), mark(kept),
            Cell(number(load["ceiling"]), small=f"bound by {load['bound']}"),
            percent(load["share"]), percent(None if rate is None else rate / load["ceiling"]),
        ))  # fmt: skip
    headings = ["workload", "target", "measured", "result", "ceiling", "target / ceiling"]
    headings.append("measured / ceiling")
    lead = (
        f"Output tokens per second on {report['card']}. The ceiling is what its memory bandwidth "
        "and tensor peak allow a decode step at most, without speculation."
    )
    if not on_card:
        lead += " Nothing was measured on this card."
    ceilings = {load["name"]: load for load in planned}
    plots = _throughput_charts(report["speed"] if on_card else (), ceilings)
    blocks: list[Block] = [Table(headings=headings, rows=rows), *plots]
    return Section(title="Targets on the card", blocks=blocks, lead=lead)


def latency(report: Entry) -> Section | None:
    """Percentiles where there are any, else medians."""
    timed = {
        key: [entry for entry in report["speed"] if entry.get(key) is not None]
        for key in _LATENCIES
    }
    keys = [key for key, entries in timed.items() if entries]
    if not keys:
        return None
    rows = [
        (entry["workload"], *(_percentiles(entry.get(key)) for key in keys))
        for entry in report["speed"]
        if any(entry.get(key) is not None for key in keys)
    ]
    plots = []
    lead = "Milliseconds: medians over the runs. Percentiles of requests were not measured."
    for key in keys:
        drawn = [
            (str(entry["workload"])[:24], [float(entry[key][p]) for p in _PERCENTILES])
            for entry in timed[key]
            if isinstance(entry[key], Mapping) and entry[key].keys() >= set(_PERCENTILES)
        ]
        if drawn:
            lead = "Milliseconds: the median, and what 90 % and 99 % of the requests keep to."
        if drawn and charts.installed():
            plots.append(charts.latency_chart(drawn, _LATENCIES[key].capitalize()))
    headings = ["workload", *(_LATENCIES[key] for key in keys)]
    blocks: list[Block] = [Table(headings=headings, rows=rows), *_beside(plots)]
    return Section(title="Latency", blocks=blocks, lead=lead)


def _percentiles(value: object) -> Cell:
    """A median, with the percentiles that there are below it."""
    figures = value if isinstance(value, Mapping) else {"p50": value}
    others = [f"{name}\u00a0{number(figures[name])}" for name in figures if name != "p50"]
    return Cell(number(figures.get("p50")), small=" \u00b7 ".join(others))


def sustained(report: Entry) -> Section | None:
    """Throughput and memory of a long run over time."""
    run = report.get("sustained")
    if not run:
        return None
    figures, limits = run.get("figures"), run["limits"]
    pairs: list[tuple[str, object]] = [("workload", run["workload"])]
    if figures:
        drop = f"{figures['throughput_drop']:.1%} ({limits['max_throughput_drop']:.1%} allowed)"
        growth, allowed = figures["memory_growth_bytes"], limits["max_memory_growth_bytes"]
        grown = DASH if growth is None else f"{mebibytes(growth)} ({mebibytes(allowed)} allowed)"
        pairs += [
            ("compared", f"{figures['duration_s'] / 60:.1f} minutes"),
            ("first window", number(figures["first_tokens_per_s"], "tok/s")),
            ("last window", number(figures["last_tokens_per_s"], "tok/s")),
            ("drop", drop),
            ("memory growth", grown),
        ]
    else:
        pairs.append(("compared", "no: too short a run, or too few samples"))
    pairs += _cache_cleared(run.get("cache_cleared"))
    lead = "Medians of the first and the last window are compared; the warm-up does not count."
    blocks: list[Block] = [Facts(pairs=pairs), *_beside(_sustained_charts(run))]
    return Section(title="Sustained run", blocks=blocks, lead=lead)


def _sustained_charts(run: Entry) -> list[tuple[str, str]]:
    """Rate, memory, temperature and power over time, as far as they were sampled."""
    samples, limits = run["samples"], run["limits"]
    if not samples or not charts.installed():
        return []
    minutes = [sample["t_s"] / 60 for sample in samples]
    rates = [sample["output_tokens_per_s"] for sample in samples]
    windows, levels = _windows(samples, limits, run.get("figures"))
    plots = [
        charts.time_chart(
            minutes, rates, "Throughput over time", "output tokens per second",
            shaded=windows, levels=levels,
        )
    ]  # fmt: skip
    if _complete(samples, "memory_bytes"):
        # The change: a leak of megabytes cannot be seen beside gigabytes of weights.
        grown = [(s["memory_bytes"] - samples[0]["memory_bytes"]) / 2**20 for s in samples]
        allowed = limits["max_memory_growth_bytes"] / 2**20
        caption = "Device memory against its start"
        plots.append(charts.time_chart(minutes, grown, caption, "MiB", least_span=allowed))
    for key, caption, unit in (
        ("temperature_c", "Temperature over time", "\u00b0C"),
        ("power_w", "Power over time", "W"),
    ):
        if _complete(samples, key):
            values = [sample[key] for sample in samples]
            plots.append(charts.time_chart(minutes, values, caption, unit))
    return plots


def _cache_cleared(run: Entry | None) -> list[tuple[str, object]]:
    """What freeing the allocator's cache after each batch changed in a second run."""
    if not run:
        return []
    effect, figures = run["effect"], run.get("figures") or {}
    rate, memory = effect["throughput_change"], effect["memory_change_bytes"]
    return [
        ("cache freed after each batch", "a second run as long"),
        ("its throughput", DASH if rate is None else f"{rate:+.1%}".replace("-", "\u2212")),
        ("its memory", mebibytes(memory, "+.1f")),
        ("its memory growth", mebibytes(figures.get("memory_growth_bytes"))),
    ]


def _complete(samples: Sequence[Entry], key: str) -> bool:
    return all(sample.get(key) is not None for sample in samples)


def _windows(
    samples: Sequence[Entry], limits: Entry, figures: Entry | None
) -> tuple[list[tuple[float, float]], list[float]]:
    """The two windows in minutes, and their medians."""
    if not figures:
        return [], []
    start = min(s["t_s"] for s in samples if s["t_s"] >= limits["warm_up_s"])
    end, width = samples[-1]["t_s"], limits["window_s"]
    windows = [(start / 60, (start + width) / 60), ((end - width) / 60, end / 60)]
    return windows, [figures["first_tokens_per_s"], figures["last_tokens_per_s"]]


def _throughput_charts(entries: Sequence[Entry], planned: Mapping[str, Entry]) -> list[Block]:
    """One plot for each pair of prompt and output length that has at least two batches."""
    if not charts.installed():
        return []
    # What arrives at a rate is not faster with a larger batch.
    entries = [entry for entry in entries if not entry.get("request_rate")]
    plots = []
    for isl, osl in sorted({(load["isl"], load["osl"]) for load in (*entries, *planned.values())}):
        mine = _of_lengths(entries, isl, osl)
        plan = _of_lengths(planned.values(), isl, osl)
        if len({load["batch"] for load in (*mine, *plan)}) < 2:
            continue
        wanted = [load for load in plan if load["target"] is not None]
        raw = [(e["batch"], rate) for e in mine for rate in e.get("samples", ())]
        series = [
            _series("engine", "engine", mine, [e["output_tokens_per_s"] for e in mine], raw),
            _series("ceiling of the card", "ceiling", plan, [load["ceiling"] for load in plan]),
            _series("target", "target", wanted, [load["target"] for load in wanted]),
        ]
        caption = f"Throughput over batch, {isl} prompt and {osl} output tokens"
        plots.append(charts.throughput_chart([one for one in series if one.x], caption))
    return _beside(plots)


def _beside(plots: Sequence[tuple[str, str]]) -> list[Block]:
    return [Charts(plots=plots)] if plots else []


def _of_lengths(loads: Iterable[Entry], isl: int, osl: int) -> list[Entry]:
    found = [load for load in loads if (load["isl"], load["osl"]) == (isl, osl)]
    return sorted(found, key=lambda load: int(load["batch"]))


def _series(
    label: str,
    look: str,
    loads: Sequence[Entry],
    rates: Sequence[float],
    raw: Sequence[tuple[float, float]] = (),
) -> Series:
    return Series(label=label, look=look, x=[load["batch"] for load in loads], y=rates, raw=raw)


def _on_card(report: Entry) -> bool:
    """Whether it was measured on the card that the plan's ceilings are of."""
    return bool(report["conditions"].get("card") == report["card"])


def _entry_of(report: Entry, load: Entry) -> Entry | None:
    """The measurement of a planned workload."""
    keys = ("batch", "isl", "osl")
    for entry in report["speed"]:
        if entry["workload"] == load["name"] and all(entry[key] == load[key] for key in keys):
            return dict(entry)
    return None


def _required(entry: Entry) -> tuple[object, Cell]:
    """What the recipe demands of a workload here, and whether it is met."""
    least = entry.get("min_output_tokens_per_s")
    if least is None:
        return DASH, mark(None)
    return number(least, "tok/s"), mark(bool(entry["output_tokens_per_s"] >= least))


def _workload(name: str, load: Entry) -> Cell:
    """A workload with its sizes below the name."""
    rate = load.get("request_rate")
    count = f"batch {load['batch']}"
    if rate:
        count = f"{rate['asked']:g}\u00a0requests/s, {load['batch']} at once"
    lengths = f"{load['isl']}\u00a0+\u00a0{load['osl']}\u00a0tokens"
    isl, osl = (load.get(f"mean_{key}", load[key]) for key in ("isl", "osl"))
    if (isl, osl) != (load["isl"], load["osl"]):
        lengths += f" at most, {isl:.0f}\u00a0+\u00a0{osl:.0f} in the mean"
    return Cell(name, small=f"{count} \u00b7 {lengths}")


def _spread(samples: Sequence[float]) -> str:
    if len(samples) < 2:
        return "one run" if samples else DASH
    middle = statistics.median(samples)
    if middle <= 0:
        return DASH
    low, high = min(samples) / middle - 1, max(samples) / middle - 1
    return f"{low:+.1%} to {high:+.1%}, {len(samples)} runs".replace("-", "\u2212")


def _scaled(value: object, scale: float) -> float | None:
    return value / scale if isinstance(value, (int, float)) else None
