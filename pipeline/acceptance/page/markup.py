"""HTML by function calls: whatever is not `Html` already is escaped, so nothing can be forgotten.

Names, answers and messages of a report come from models and configurations that nobody vouches for.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

# Not allowed in HTML, or in UTF-8 at all: controls but tab and newline, and lone surrogates.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_VOID = frozenset({"meta", "br"})
_SPELLED = {
    "cpu": "CPU", "cpus": "CPUs", "cuda": "CUDA", "ecc": "ECC", "fp8": "FP8", "gemms": "GEMMs",
    "gpu": "GPU", "kv": "KV", "onnxruntime": "ONNX Runtime", "rtx": "RTX", "sm": "SM",
    "tensorrt": "TensorRT", "torch": "PyTorch", "transformers": "Transformers", "vllm": "vLLM",
}  # fmt: skip
DASH = "\u2013"
"""Stands for a figure that was not measured."""


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def escaped(value: object) -> Html:
    """`value` as text of a page; `Html` stays what it is."""
    if isinstance(value, Html):
        return value
    return Html(html.escape(printable(value)))


def printable(value: object) -> str:
    """`value` as text without characters that a page must not have."""
    return _UNPRINTABLE.sub("\ufffd", str(value))


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """An element. `class_` is the attribute class, other underscores are hyphens."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escaped(str(value))}"'
        for key, value in attributes.items()
    )
    if name in _VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{''.join(escaped(child) for child in children)}</{name}>")


def join(parts: Sequence[Html]) -> Html:
    """Elements one after the other."""
    return Html("\n".join(parts))


def section(title: str, *children: object, lead: str = "") -> Html:
    """A section with heading and, if there is one, a sentence on what it shows."""
    intro = tag("p", lead, class_="lead") if lead else Html("")
    return tag("section", tag("h2", title), intro, *children)


def with_small(figure: str, small: str) -> Html:
    """A figure with a small line below it."""
    return Html(escaped(figure) + tag("span", small, class_="small")) if small else escaped(figure)


def table(headings: Sequence[str], rows: Sequence[Sequence[object]], *, words: int = 1) -> Html:
    """A table in a container that scrolls by itself where the screen is narrow.

    Args:
        headings: One for each column.
        rows: Cells.
        words: How many columns, from the left, hold words; the others are set right as numbers.
    """

    def kind(index: int) -> dict[str, str]:
        return {} if index < words else {"class_": "number"}

    head = [tag("th", text, scope="col", **kind(index)) for index, text in enumerate(headings)]
    body = [
        tag(
            "tr",
            tag("th", row[0], scope="row"),
            *(tag("td", cell, **kind(index)) for index, cell in enumerate(row[1:], start=1)),
        )
        for row in rows
    ]
    inner = tag("table", tag("thead", tag("tr", *head)), tag("tbody", *body))
    # Focusable, so that a keyboard can scroll it too.
    return tag("div", inner, class_="scroll", tabindex="0")


def facts(values: Mapping[str, Any]) -> Html:
    """A nested mapping as a definition list; mappings of like mappings become tables."""
    plain = {key: value for key, value in values.items() if not isinstance(value, Mapping)}
    nested = {key: value for key, value in values.items() if isinstance(value, Mapping) and value}
    parts = []
    if plain:
        pairs = [
            tag("div", tag("dt", spoken(key)), tag("dd", shown(value)))
            for key, value in plain.items()
        ]
        parts.append(tag("dl", *pairs, class_="facts"))
    for key, value in nested.items():
        parts += [tag("h4", spoken(key)), _nested(value)]
    return join(parts)


def _nested(value: Mapping[str, Any]) -> Html:
    rows = list(value.values())
    if all(isinstance(row, Mapping) and row and row.keys() == rows[0].keys() for row in rows):
        headings = ["", *(spoken(key) for key in rows[0])]
        return table(
            headings,
            [
                [spoken(name), *(shown(cell) for cell in row.values())]
                for name, row in value.items()
            ],
        )
    return facts(value)


def spoken(key: object) -> str:
    """A key of the report for people: `kv_cache_dtype` becomes `KV cache dtype`."""
    return " ".join(_SPELLED.get(word, word) for word in str(key).split("_"))


def shown(value: object) -> str:
    """Any plain value of the report for people."""
    if value is None or value == "":
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{spoken(key)} {shown(item)}" for key, item in value.items()) or "none"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "; ".join(shown(item) for item in value) or "none"
    return str(value)


def number(value: object, unit: str = "") -> str:
    """A measured figure with three to four digits; a dash if there is none."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return DASH
    size = abs(value)
    if not math.isfinite(value):
        return str(value)
    if size >= 1e7:
        text = f"{value:.3g}"
    elif size >= 1000:
        text = f"{value:,.0f}"
    elif size >= 10 or size == 0:
        text = f"{value:.1f}"
    else:
        text = f"{value:.3g}"
    return f"{text}\u00a0{unit}" if unit else text
