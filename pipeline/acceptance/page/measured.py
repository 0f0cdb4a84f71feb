"""The page's sections on what was timed: speed, targets, latency, sustained run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.acceptance.page import charts
from pipeline.acceptance.page.charts import Series
from pipeline.acceptance.page.markup import (
    DASH,
    Html,
    facts,
    number,
    printable,
    section,
    table,
    tag,
    with_small,
)
from pipeline.acceptance.page.sections import NOTHING, mark
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


def speed(report: Entry) -> Html:
    """Median, spread and comparison of every workload."""
    entries: Sequence[Entry] = report["speed"]
    if not entries:
        return NOTHING
    headings = ("workload", "tokens/s", "Transformers", "ratio", "required", "result")
    rows = [
        (
            _workload(entry["workload"], entry),
            with_small(number(entry["output_tokens_per_s"]), _spread(entry.get("samples", ()))),
            number(entry.get("transformers", {}).get("output_tokens_per_s")),
            _times(entry.get("ratio_to_transformers")), *_required(entry),
        )
        for entry in entries
    ]  # fmt: skip
    device = report["conditions"].get("card") or report["conditions"]["device"]
    lead = (
        f"Measured on {device}. Output tokens per second of the whole batch, prefill included: the "
        "median of all runs, and how far the slowest and the fastest lie from it."
    )
    if not _on_card(report):
        lead += f" It says nothing about the speed on {report['card']}."
    chart = _throughput_charts(entries, {}) if not _on_card(report) else NOTHING
    parts = (table(headings, rows), _request_rates(entries), _costs(entries), chart)
    return section("Speed", *parts, lead=lead)


def _request_rates(entries: Sequence[Entry]) -> Html:
    """What arrived against what was answered, where requests arrive at a rate."""
    open_loop = [entry for entry in entries if entry.get("request_rate")]
    if not open_loop:
        return NOTHING
    rows = []
    for entry in open_loop:
        asked, achieved = (float(entry["request_rate"][key]) for key in ("asked", "achieved"))
        kept = mark(achieved >= MIN_ACHIEVED_SHARE * asked)
        rows.append((_workload(entry["workload"], entry), number(asked), number(achieved), kept))
    told = (
        "Requests a second. They arrive whether or not the others have been answered, and times "
        f"count from the arrival; {MIN_ACHIEVED_SHARE:.0%} must be kept up with."
    )
    headings = ("workload", "arrive", "answered", "result")
    return Html(tag("h3", "Request rate") + tag("p", told, class_="small") + table(headings, rows))


def _costs(entries: Sequence[Entry]) -> Html:
    """Memory and energy, where they were measured."""
    known = [cost for cost in _COSTS if any(entry.get(cost[0]) is not None for entry in entries)]
    if not known:
        return NOTHING
    rows = [
        (entry["workload"], *(number(_scaled(entry.get(key), scale)) for key, _, scale in known))
        for entry in entries
    ]
    headings = ("workload", *(name for _, name, _ in known))
    return Html(tag("h3", "Memory and energy") + table(headings, rows))


def targets(report: Entry, plan: Entry) -> Html:
    """What the recipe wants of the card, what the card allows, and what was reached."""
    planned: Sequence[Entry] = plan.get("workloads", ())
    on_card = _on_card(report)
    if not planned:
        chart = _throughput_charts(report["speed"], {}) if on_card else NOTHING
        return section("Throughput over batch", chart) if chart else NOTHING
    rows = []
    for load in planned:
        entry = _entry_of(report, load) if on_card else None
        rate = entry["output_tokens_per_s"] if entry else None
        target = load["target"]
        kept = None if rate is None or target is None else bool(rate >= target)
        rows.append((
            _workload(load["name"], load), number(target),
            "not run" if rate is None else number(rate), mark(kept),
            with_small(number(load["ceiling"]), f"bound by {load['bound']}"),
            _percent(load["share"]), _percent(None if rate is None else rate / load["ceiling"]),
        ))  # fmt: skip
    headings = ["workload", "target", "measured", "result", "ceiling", "target / ceiling"]
    headings.append("measured / ceiling")
    card = report["card"]
    lead = (
        f"Output tokens per second on {card}. The ceiling is what its memory bandwidth and tensor "
        "peak allow a decode step at most, without speculation."
    )
    if not on_card:
        lead += " Nothing was measured on this card."
    ceilings = {load["name"]: load for load in planned}
    chart = _throughput_charts(report["speed"] if on_card else (), ceilings)
    return section("Targets on the card", table(headings, rows), chart, lead=lead)


def latency(report: Entry) -> Html:
    """Percentiles where there are any, else medians."""
    timed = {
        key: [entry for entry in report["speed"] if entry.get(key) is not None]
        for key in _LATENCIES
    }
    keys = [key for key, entries in timed.items() if entries]
    if not keys:
        return NOTHING
    rows = [
        (entry["workload"], *(_percentiles(entry.get(key)) for key in keys))
        for entry in report["speed"]
        if any(entry.get(key) is not None for key in keys)
    ]
    plots = []
    lead = "Milliseconds: medians over the runs. Percentiles of requests were not measured."
    for key in keys:
        drawn = [
            (printable(entry["workload"])[:24], [float(entry[key][p]) for p in _PERCENTILES])
            for entry in timed[key]
            if isinstance(entry[key], Mapping) and entry[key].keys() >= set(_PERCENTILES)
        ]
        if drawn:
            lead = "Milliseconds: the median, and what 90 % and 99 % of the requests keep to."
        if drawn and charts.installed():
            plots.append(charts.latency_chart(drawn, _LATENCIES[key].capitalize()))
    chart = tag("div", *plots, class_="charts") if plots else NOTHING
    headings = ["workload", *(_LATENCIES[key] for key in keys)]
    return section("Latency", table(headings, rows), chart, lead=lead)


def _percentiles(value: object) -> Html:
    """A median, with the percentiles that there are below it."""
    figures = value if isinstance(value, Mapping) else {"p50": value}
    others = [f"{name}\u00a0{number(figures[name])}" for name in figures if name != "p50"]
    return with_small(number(figures.get("p50")), " \u00b7 ".join(others))


def sustained(report: Entry) -> Html:
    """Throughput and memory of a long run over time."""
    run = report.get("sustained")
    if not run:
        return NOTHING
    samples, figures, limits = run["samples"], run.get("figures"), run["limits"]
    told: dict[str, object] = {"workload": run["workload"]}
    if figures:
        growth = figures["memory_growth_bytes"]
        told |= {
            "judged": f"{figures['duration_s'] / 60:.1f} minutes",
            "first window": number(figures["first_tokens_per_s"], "tok/s"),
            "last window": number(figures["last_tokens_per_s"], "tok/s"),
            "drop": f"{figures['throughput_drop']:.1%} "
            f"({limits['max_throughput_drop']:.1%} allowed)",
            "memory growth": DASH
            if growth is None
            else f"{growth / 2**20:.1f} MiB "
            f"({limits['max_memory_growth_bytes'] / 2**20:.1f} MiB allowed)",
        }
    else:
        told["judged"] = "no: too short a run, or too few samples"
    told |= _cache_cleared(run.get("cache_cleared"))
    plots: list[Html] = []
    if samples and charts.installed():
        minutes = [sample["t_s"] / 60 for sample in samples]
        rates = [sample["output_tokens_per_s"] for sample in samples]
        windows, levels = _windows(samples, limits, figures)
        plots.append(
            charts.time_chart(
                minutes, rates, "Throughput over time", "output tokens per second",
                shaded=windows, levels=levels,
            )
        )  # fmt: skip
        if _complete(samples, "memory_bytes"):
            # The change: a leak of megabytes cannot be seen beside gigabytes of weights.
            grown = [(s["memory_bytes"] - samples[0]["memory_bytes"]) / 2**20 for s in samples]
            caption = "Device memory against its start"
            allowed = limits["max_memory_growth_bytes"] / 2**20
            plots.append(charts.time_chart(minutes, grown, caption, "MiB", least_span=allowed))
        for key, caption, unit in (
            ("temperature_c", "Temperature over time", "\u00b0C"),
            ("power_w", "Power over time", "W"),
        ):
            if _complete(samples, key):
                values = [sample[key] for sample in samples]
                plots.append(charts.time_chart(minutes, values, caption, unit))
    chart = tag("div", *plots, class_="charts") if plots else NOTHING
    lead = "Medians of the first and the last window are compared; the warm-up is not judged."
    return section("Sustained run", facts(told), chart, lead=lead)


def _cache_cleared(run: Entry | None) -> dict[str, object]:
    """What freeing the allocator's cache after each batch changed in a second run."""
    if not run:
        return {}
    effect, figures = run["effect"], run.get("figures") or {}
    rate, memory = effect["throughput_change"], effect["memory_change_bytes"]
    growth = figures.get("memory_growth_bytes")
    return {
        "cache freed after each batch": "a second run as long",
        "its throughput": DASH if rate is None else f"{rate:+.1%}".replace("-", "\u2212"),
        "its memory": DASH
        if memory is None
        else f"{memory / 2**20:+.1f} MiB".replace("-", "\u2212"),
        "its memory growth": DASH if growth is None else f"{growth / 2**20:.1f} MiB",
    }


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


def _throughput_charts(entries: Sequence[Entry], planned: Mapping[str, Entry]) -> Html:
    """One plot for each pair of prompt and output length that has at least two batches."""
    if not charts.installed():
        return NOTHING
    # What arrives at a rate is not faster with a larger batch.
    entries = [entry for entry in entries if not entry.get("request_rate")]
    everything = [*entries, *planned.values()]
    lengths = sorted({(load["isl"], load["osl"]) for load in everything})
    plots = []
    for isl, osl in lengths:
        mine = _of_lengths(entries, isl, osl)
        plan = _of_lengths(planned.values(), isl, osl)
        if len({load["batch"] for load in (*mine, *plan)}) < 2:
            continue
        baseline = [entry for entry in mine if entry.get("transformers")]
        wanted = [load for load in plan if load["target"] is not None]
        raw = [(e["batch"], rate) for e in mine for rate in e.get("samples", ())]
        series = [
            _series("engine", "engine", mine, [e["output_tokens_per_s"] for e in mine], raw),
            _series("Transformers", "baseline", baseline,
                    [e["transformers"]["output_tokens_per_s"] for e in baseline]),
            _series("ceiling of the card", "ceiling", plan, [load["ceiling"] for load in plan]),
            _series("target", "target", wanted, [load["target"] for load in wanted]),
        ]  # fmt: skip
        caption = f"Throughput over batch, {isl} prompt and {osl} output tokens"
        plots.append(charts.throughput_chart([one for one in series if one.x], caption))
    return tag("div", *plots, class_="charts") if plots else NOTHING


def _of_lengths(loads: Any, isl: int, osl: int) -> list[Entry]:
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


def _required(entry: Entry) -> tuple[object, Html]:
    """What the recipe demands of a workload here, and whether it is met."""
    least = entry.get("min_output_tokens_per_s")
    if least is None:
        return DASH, mark(None)
    return number(least, "tok/s"), mark(bool(entry["output_tokens_per_s"] >= least))


def _workload(name: str, load: Entry) -> Html:
    """A workload with its sizes below the name."""
    rate = load.get("request_rate")
    count = f"batch {load['batch']}"
    if rate:
        count = f"{rate['asked']:g}\u00a0requests/s, {load['batch']} at once"
    lengths = f"{load['isl']}\u00a0+\u00a0{load['osl']}\u00a0tokens"
    isl, osl = (load.get(f"mean_{key}", load[key]) for key in ("isl", "osl"))
    if (isl, osl) != (load["isl"], load["osl"]):
        lengths += f" at most, {isl:.0f}\u00a0+\u00a0{osl:.0f} in the mean"
    return with_small(name, f"{count} \u00b7 {lengths}")


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


def _times(value: float | None) -> str:
    return DASH if value is None else f"{value:.2f}\u00a0\u00d7"


def _percent(value: float | None) -> str:
    return DASH if value is None else f"{value:.0%}"
