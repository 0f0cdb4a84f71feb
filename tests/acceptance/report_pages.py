"""Reports to draw, and a reader of the pages."""

from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser
from typing import Any

from pipeline.acceptance.sustained import Sample, SustainedLimits, sustained_json
from tests.acceptance.questions import acceptance

LIMITS = acceptance()
_VOID = {"meta", "br", "img"}


class Page(HTMLParser):
    """Elements, attributes and visible text of a page; fails on tags that do not nest."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.open: list[str] = []
        self.elements: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def row(self, heading: str, name: str) -> str:
        """Text of the first table row `name` in a section, in ASCII where it matters."""
        section = self.source.split(f"<h2>{heading}</h2>")[1].split("</section>")[0]
        found, *_ = (row for row in re.findall("<tr>.*?</tr>", section, re.S) if f">{name}<" in row)
        text = re.sub(r"\s+", " ", re.sub("<[^>]+>", " ", found)).strip()
        return text.translate(str.maketrans("\u2013\u00d7\u2212", "-x-"))


def interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.001, "high": value + 0.001}


def entry(name: str, batch: int, rate: float, **more: Any) -> dict[str, Any]:
    return {
        "workload": name, "workload_digest": "w" * 64, "batch": batch, "isl": 128, "osl": 256,
        "output_tokens_per_s": rate, "ttft_ms": 11.5, "itl_ms": 2.75,
        "min_output_tokens_per_s": None,
        "samples": [0.9 * rate, rate, 1.05 * rate], **more,
    }  # fmt: skip


def report(**changed: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "digest": "d" * 64,
        "card": "NVIDIA-GeForce-RTX-4090",
        "conditions": {"device": "cpu", "cpus": 2, "tools": {"torch": "2.13.0"}},
        "speed": [entry("b1", 1, 321.0), entry("b8", 8, 2000.0)],
        "quality": {
            "tokens": 9180, "windows": 36,
            "source_perplexity": interval(11.25), "engine_perplexity": interval(11.5),
            "perplexity_change": interval(0.005), "mean_kl_nats": interval(0.04),
            "top1_agreement": interval(0.9),
            "sample": {"prompt": "Capital of France?", "answer": "It is Paris."},
        },
        "checks": {"plan": {"quantized_gemms": 8, "other_gemms": 25}},
        "not_run": ["FP8 KV cache: kept in float32 here"],
        "verdict": "checked",
        "findings": [{"kind": "note", "message": "not run: FP8 KV cache: kept in float32 here"}],
        **changed,
    }  # fmt: skip


def on_card(**changed: Any) -> dict[str, Any]:
    conditions = {"device": "cuda", "card": "NVIDIA-GeForce-RTX-4090"}
    return report(conditions=conditions, verdict="accepted", **changed)


def planned(name: str, batch: int, ceiling: float, target: float | None) -> dict[str, Any]:
    share = None if target is None else target / ceiling
    return {
        "name": name, "batch": batch, "isl": 128, "osl": 256, "ceiling": ceiling,
        "bound": "memory", "target": target, "share": share,
    }  # fmt: skip


PLAN = {"workloads": [planned("b1", 1, 642.0, 321.0), planned("b8", 8, 4000.0, 2001.0)]}
MANIFEST = {
    "name": "tiny", "variant": "sm89-trtrtx-fp8-b2-s128", "version": "1.0.0-abc",
    "format": "trtrtx", "files": [{"path": "engine/a", "size": 3 * 2**20, "sha256": "0"}],
    "match": {"runtime": {"name": "tensorrt-rtx", "version": "1.7.1.116"}},
    "limits": {"max_batch_size": 2}, "licence": {"spdx": "CC0-1.0"},
    "source": {"origin": "hub:a/b", "note": "random numbers"},
}  # fmt: skip


def long_run(seconds: int = 600) -> dict[str, Any]:
    limits = SustainedLimits(
        max_throughput_drop=0.05, max_memory_growth_bytes=20 * 2**20, warm_up_s=30,
        window_s=60, min_duration_s=300,
    )  # fmt: skip
    samples = [
        Sample(
            t_s=float(t_s), output_tokens_per_s=1000.0 - t_s / 2,
            memory_bytes=10**10 + t_s * 2**20, temperature_c=60.0,
        )
        for t_s in range(0, seconds, 5)
    ]  # fmt: skip
    return dict(sustained_json(samples, limits, "b8"))


def everything() -> dict[str, Any]:
    percentiles = {"p50": 10.0, "p90": 14.0, "p99": 31.0}
    speed = [
        entry(
            name, batch, rate, ttft_ms=percentiles, request_latency_ms=percentiles,
            peers={"transformers": {
                "label": "Hugging Face generate", "output_tokens_per_s": rate / 8,
                "ratio": {"median": 8.0, "low": 7.9, "high": 8.1, "rounds": 3},
            }},
            peak_memory_bytes=2**33, mean_power_w=300.0, joules_per_token=0.9,
        )
        for name, batch, rate in (("b1", 1, 321.0), ("b8", 8, 2000.0))
    ]  # fmt: skip
    return on_card(speed=speed, sustained=long_run())
