"""A race on the screen: rates, and the ratio to each peer with its interval."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def shown(report: Mapping[str, Any], files: Mapping[str, Path]) -> list[RenderableType]:
    """The report for people; `files`: what was written, by name."""
    lines = said(report) + [f"{name:<8} {path}" for name, path in files.items()]
    return [rates_table(report), ratio_table(report), *lines]


def said(report: Mapping[str, Any]) -> list[str]:
    """The verdict, what speaks against it, and what goes on."""
    lines = [f"{report['verdict']}: {report['statement']}"]
    lines += [f"{finding['kind']}: {finding['message']}" for finding in report["findings"]]
    for pair in report["pairs"]:
        if pair["failure"]:
            failure = pair["failure"]
            lines.append(f"{pair['peer']}: {failure['contender']} failed: {failure['message']}")
        elif pair["state"] != "complete":
            lines.append(f"{pair['peer']}: {missing_text(pair, report)}")
    lines += [f"{name} did not run: {why}" for name, why in report["not_raced"].items()]
    if report["next_command"]:
        lines.append(f"to go on: {report['next_command']}")
    return lines


def rates_table(report: Mapping[str, Any]) -> Table:
    """Median output tokens per second of every contender, by workload."""
    from rich.table import Table

    names = [load["name"] for load in report["workloads"]]
    table = Table("output tok/s, median", *names)
    rates = {
        (row["contender"], row["workload"]): row["output_tokens_per_s"]
        for row in report["throughput"]
    }
    for name, contender in report["contenders"].items():
        cells = [rates.get((name, workload)) for workload in names]
        table.add_row(
            contender["label"], *("-" if cell is None else f"{cell:,.1f}" for cell in cells)
        )
    if report["ceilings"]:
        cells = [row["output_tokens_per_s"] for row in report["ceilings"]]
        table.add_row("ceiling of the card, our artifact", *(f"{cell:,.0f}" for cell in cells))
    return table


def ratio_table(report: Mapping[str, Any]) -> Table:
    """Ours over each peer: median and 95 % interval."""
    from rich.table import Table

    names = [load["name"] for load in report["workloads"]]
    table = Table("ours / peer", *names, "rounds")
    for pair in report["pairs"]:
        found = {row["workload"]: row["ratio"] for row in pair["workloads"]}
        cells = ["\n".join(ratio_parts(found.get(name))) for name in names]
        rounds = min((row["rounds"] for row in found.values()), default=0)
        label = report["contenders"][pair["peer"]]["label"]
        table.add_row(label, *cells, f"{rounds} of {pair['rounds']}")
    return table


def ratio_parts(ratio: Mapping[str, Any] | None) -> tuple[str, str]:
    """The median and its interval, such as `1.171` and `1.168 to 1.174`."""
    if ratio is None:
        return "-", ""
    if ratio["low"] is None:
        return f"{ratio['median']:.3f}", "no interval"
    return f"{ratio['median']:.3f}", f"{ratio['low']:.3f} to {ratio['high']:.3f}"


def missing_text(pair: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """Which rounds a pair lacks."""
    done = {row["workload"]: row["ratio"]["rounds"] for row in pair["workloads"]}
    lacking = [
        f"{load['name']} {pair['rounds'] - done.get(load['name'], 0)}"
        for load in report["workloads"]
        if done.get(load["name"], 0) < pair["rounds"]
    ]
    return f"missing rounds: {', '.join(lacking)}"


def label_of(report: Mapping[str, Any], name: str) -> str:
    """A contender for people."""
    label = report["contenders"].get(name, {}).get("label", name)
    return str(label)
