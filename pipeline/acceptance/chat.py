"""The chat probe: does the engine end its answers where its source does?

An engine that never stops talking passes every figure that is taken from logits alone. So the same
short conversations go through the chat template to the source and to the engine, greedily, with a
bound on the answer's length, and `_regressions` looks at five things. The last, that the engine
ends no fewer answers than the source and has no more empty ones, is a count with noise in it, so
the exact test of McNemar applies (Psychometrika 12, 1947).
Of the pairs in which one side ended and the other did not, an engine that ends like its source
loses each with probability 1/2; below `LEVEL` the chance to lose as many or more is a regression.
A source that itself ends fewer than `LEAST_STOPS` answers cannot show anything.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from importlib.resources import files
from typing import Annotated, Any

import yaml
from annotated_types import Ge, Le
from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from pipeline.core.settings import STRICT
from pipeline.core.values import Finding
from pipeline.model.hf import chat_ids
from pipeline.runners.runner import Session
from pipeline.runners.workload import BatchOptions, eos_ids

LEVEL = 0.05
"""A healthy engine is called worse in no more than one of twenty probes; the usual level."""
LEAST_STOPS = 5
"""The fewest lost answers that can fall below `LEVEL`: 1/2^5 < 0.05 < 1/2^4."""
Message = dict[str, str]
"""Keys `role` and `content`, as chat templates take them."""


def _conversation(turns: Sequence[str], system: str = "") -> tuple[Message, ...]:
    start = [{"role": "system", "content": system}] if system else []
    roles = itertools.cycle(("user", "assistant"))
    return (*start, *({"role": next(roles), "content": content} for content in turns))


CONVERSATIONS: dict[str, tuple[Message, ...]] = {
    name: _conversation(**said)
    for name, said in yaml.safe_load(
        files(__package__).joinpath("chat_prompts.yaml").read_text(encoding="utf-8")
    ).items()
}
"""Name in the report -> what comes before the answer."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ChatSettings:
    """How much the chat probe asks.

    Attributes:
        prompts: How many conversations; 8 or more, so that a loss can be told from chance.
        max_new_tokens: Bound of an answer. One that reaches it did not end.
        min_source_stops: How many answers the source must end itself, else the probe is
            inconclusive. 0 for a model that was never trained to end one.
    """

    prompts: Annotated[PositiveInt, Ge(8), Le(len(CONVERSATIONS))]
    max_new_tokens: PositiveInt
    min_source_stops: NonNegativeInt = LEAST_STOPS


@plain_dataclass(frozen=True, kw_only=True)
class Answer:
    """A greedy answer without its end; `stopped`: it ended by itself, before the bound."""

    tokens: tuple[int, ...]
    stopped: bool

    def to_json(self, tokenizer: Any) -> dict[str, Any]:
        text = tokenizer.decode(list(self.tokens), skip_special_tokens=False)
        return {"tokens": len(self.tokens), "stopped": self.stopped, "text": text}


@plain_dataclass(frozen=True, kw_only=True)
class Asked:
    """A conversation as token ids of both folders; None where the engine's template refuses it."""

    name: str
    source: tuple[int, ...]
    engine: tuple[int, ...] | None


def end_ids(tokenizer: Any) -> frozenset[int]:
    """Ids at which a server ends an answer: `generation_config.json`'s and the tokenizer's own.

    vLLM takes both (vllm/sampling_params.py, `update_from_generation_config`, 0.24.0).
    """
    return eos_ids(tokenizer) | ({tokenizer.eos_token_id} - {None})


@plain_dataclass(frozen=True, kw_only=True)
class ChatProbe:
    """What is asked, what ends an answer, and what is left out, with the reason."""

    settings: ChatSettings
    source_tokenizer: Any
    engine_tokenizer: Any
    source_eos: frozenset[int]
    engine_eos: frozenset[int]
    asked: tuple[Asked, ...]
    left_out: tuple[str, ...]

    @staticmethod
    def prepare(
        source_tokenizer: Any, engine_tokenizer: Any, settings: ChatSettings, *, context: int
    ) -> ChatProbe:
        """Put the conversations through the templates of both folders.

        Left out is what the source's own template refuses (some know no system prompt), and what
        does not fit into the `context`: an answer that it cuts off would look as if it had ended.
        """
        asked, left_out = [], []
        count = settings.prompts if source_tokenizer.chat_template else 0
        for name, messages in itertools.islice(CONVERSATIONS.items(), count):
            source = chat_ids(source_tokenizer, messages)
            if source is None:
                left_out.append(f"{name}: the source's template refuses it")
                continue
            engine = chat_ids(engine_tokenizer, messages)
            need = max(len(source), len(engine or ())) + settings.max_new_tokens
            if need > context:
                left_out.append(f"{name}: {need} tokens, the context has {context}")
                continue
            asked.append(Asked(name=name, source=source, engine=engine))
        return ChatProbe(
            settings=settings,
            source_tokenizer=source_tokenizer,
            engine_tokenizer=engine_tokenizer,
            source_eos=end_ids(source_tokenizer),
            engine_eos=end_ids(engine_tokenizer),
            asked=tuple(asked),
            left_out=tuple(left_out),
        )

    def ask_source(self, session: Session) -> tuple[Answer, ...]:
        """All at once: a step of ten answers takes little longer than a step of one."""
        if not self.asked:
            return ()
        bound, ends = self.settings.max_new_tokens, self.source_eos
        options = BatchOptions(osl_each=(bound,) * len(self.asked), eos_token_ids=ends)
        made = session.generate([one.source for one in self.asked], bound, options)
        rows = zip(made.tokens.tolist(), made.output_lengths, strict=True)
        given = [tuple(tokens[:length]) for tokens, length in rows]
        return tuple(
            Answer(tokens=tokens[:-1] if (ended := tokens[-1] in ends) else tokens, stopped=ended)
            for tokens in given
        )

    def ask_engine(self, session: Session, source_answers: Sequence[Answer]) -> dict[str, Any]:
        """Ask the engine too: the report's `chat`, which `chat_findings` judges."""
        if not self.source_tokenizer.chat_template:
            return {"not_run": "the source has no chat template"}
        bound, ends = self.settings.max_new_tokens, self.engine_eos
        # What the engine's template refuses is a difference, and cannot be asked.
        pairs = [
            (one, given, answer(session, one.engine, bound, ends))
            for one, given in zip(self.asked, source_answers, strict=True)
            if one.engine
        ]
        return {
            "prompts": len(self.asked),
            "left_out": list(self.left_out),
            "max_new_tokens": bound,
            "level": LEVEL,
            "min_source_stops": self.settings.min_source_stops,
            "eos": {
                "source": sorted(self.source_eos),
                "engine": sorted(ends),
                "missing": sorted(self.source_eos - ends),
            },
            "template_differs": [one.name for one in self.asked if one.source != one.engine],
            "stop_id_ignored": _ignores_stop(session, pairs, bound, ends),
            "eos_inside": [
                one.name
                for one, _, engine in pairs
                if not self.source_eos.isdisjoint(engine.tokens)
            ],
            "stopped": paired([(source.stopped, engine.stopped) for _, source, engine in pairs]),
            "not_empty": paired(
                [(bool(source.tokens), bool(engine.tokens)) for _, source, engine in pairs]
            ),
            "answers": [
                {
                    "name": one.name,
                    "source": source.to_json(self.source_tokenizer),
                    "engine": engine.to_json(self.engine_tokenizer),
                }
                for one, source, engine in pairs
            ],
        }


def answer(
    session: Session, prompt: Sequence[int], max_new_tokens: int, eos: frozenset[int]
) -> Answer:
    """One greedy answer; also ends with a session that ignores its bound."""
    stream = session.stream(prompt, max_new_tokens, eos)
    # One more than the bound: a well-behaved stream then ends by itself.
    tokens = tuple(itertools.islice(stream, max_new_tokens + 1))
    if close := getattr(stream, "close", None):
        close()
    return Answer(tokens=tokens[:max_new_tokens], stopped=len(tokens) < max_new_tokens)


def _ignores_stop(
    session: Session,
    pairs: Sequence[tuple[Asked, Answer, Answer]],
    bound: int,
    ends: frozenset[int],
) -> bool | None:
    """Whether the engine goes on behind the last token of an answer once that is an end too."""
    for one, _, given in pairs:
        if one.engine and given.tokens:
            stop = given.tokens[-1]
            again = answer(session, one.engine, bound, ends | {stop})
            return stop in again.tokens
    return None


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
    """Judge the report's `chat`; pure. `inconclusive` where the source ended too few answers."""
    if reason := chat.get("not_run"):
        yield Finding("note", f"not run: chat probe: {reason}")
        return
    for message in _regressions(chat):
        yield Finding("regression", f"chat: {message}")
    source, least = chat["stopped"]["source"], chat["min_source_stops"]
    if source < least:
        yield Finding(
            "inconclusive",
            f"chat: the source ended {source} of {len(chat['answers'])} answers within "
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
