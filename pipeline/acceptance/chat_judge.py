"""What a chat probe says about an engine: counts in, findings out; pure.

The engine must end no fewer answers within the bound than its source. That is a count with noise in
it: an FP8 engine words an answer differently, and a longer answer may run into the bound. The
answers are pairs, so the exact test of McNemar applies (Psychometrika 12, 1947; its exact form is
the sign test on the pairs that differ). Of the pairs in which one side ended and the other did not,
an engine that ends like its source loses each with probability 1/2; the chance to lose as many or
more is the sum over k >= lost of C(lost + gained, k) / 2^(lost + gained). Below `LEVEL` it is a
regression. Where the engine gains none it may lose four answers (p = 1/16), the fifth (1/32) is one
too many: so a source that itself ends fewer than `LEAST_STOPS` answers cannot show anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.core.values import Finding

LEVEL = 0.05
"""A healthy engine is called worse in no more than one of twenty probes; the usual level."""
LEAST_STOPS = 5
"""The fewest lost answers that can fall below `LEVEL`: 1/2^5 < 0.05 < 1/2^4."""


def paired(outcomes: Sequence[tuple[bool, bool]]) -> dict[str, Any]:
    """How often source and engine did it, and the chance of so large a loss without a cause."""
    lost = sum(source and not engine for source, engine in outcomes)
    gained = sum(engine and not source for source, engine in outcomes)
    return {
        "source": sum(source for source, _ in outcomes),
        "engine": sum(engine for _, engine in outcomes),
        "lost": lost,
        "gained": gained,
        "p_value": round(chance_of_loss(lost, gained), 6),
    }


def chance_of_loss(lost: int, gained: int) -> float:
    """McNemar's exact test, one-sided: P(X >= lost) for X ~ Binomial(lost + gained, 1/2)."""
    pairs = lost + gained
    ways = sum(math.comb(pairs, count) for count in range(lost, pairs + 1))
    return float(ways / 2**pairs)


def chat_findings(chat: Mapping[str, Any]) -> Iterator[Finding]:
    """Judge the report's `chat`; pure.

    Returns:
        `regression` for each of the five that fails, `inconclusive` where the source ended too few
        answers for a comparison, a note where nothing was asked.
    """
    if reason := chat.get("not_run"):
        yield Finding(kind="note", message=f"not run: chat probe: {reason}")
        return
    for message in _regressions(chat):
        yield Finding(kind="regression", message=f"chat: {message}")
    source, least = chat["stopped"]["source"], chat["min_source_stops"]
    if source < least:
        yield Finding(
            kind="inconclusive",
            message=f"chat: the source ended {source} of {len(chat['answers'])} answers within "
            f"{chat['max_new_tokens']} tokens, {least} are needed to compare; raise "
            "acceptance.chat.max_new_tokens"
            + (f" ({len(chat['left_out'])} prompts were left out)" if chat["left_out"] else ""),
        )


def _regressions(chat: Mapping[str, Any]) -> Iterator[str]:
    if differs := chat["template_differs"]:
        yield (
            f"the chat template gives other tokens from the engine's folder than from the source's "
            f"for {_some(differs)} of {chat['prompts']} prompts; compare tokenizer.json, "
            "tokenizer_config.json and chat_template.jinja of both"
        )
    if missing := chat["eos"]["missing"]:
        yield (
            f"the engine's folder does not declare the source's end-of-sequence ids {missing} "
            f"(it has {chat['eos']['engine']}); see eos_token_id in its generation_config.json"
        )
    if chat["stop_id_ignored"]:
        yield "the runtime went on behind a token id that it was told to end at"
    if inside := chat["eos_inside"]:
        yield f"an end-of-sequence id stands inside {_some(inside)} answers"
    for key, what in (("stopped", "ended by themselves"), ("not_empty", "had any text")):
        pairs = chat[key]
        if pairs["p_value"] < chat["level"]:
            yield (
                f"{pairs['engine']} of {len(chat['answers'])} answers {what}, "
                f"{pairs['source']} of the source's: {pairs['lost']} lost and {pairs['gained']} "
                f"gained, which chance does with p = {pairs['p_value']:.2g} "
                f"(level {chat['level']:g})"
            )


def _some(names: Sequence[str]) -> str:
    """How many, and the first few by name."""
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return f"{len(names)} ({shown})"
