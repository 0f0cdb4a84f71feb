"""The chat probe: does the engine end its answers where its source does?

An engine that never stops talking passes every figure that is taken from logits alone. So the same
short conversations go through the chat template to the source and to the engine, greedily, with a
bound on the answer's length, and five things are looked at:

- the template gives the same tokens from the source's folder and from the engine's;
- every end-of-sequence id of the source is one of the engine's;
- the runtime ends an answer at an id that it was told to end at;
- no end-of-sequence id stands inside an answer;
- the engine ends no fewer answers within the bound than the source, and has no more empty ones.

The last is a count with noise in it; `pipeline.acceptance.chat_judge` says how that is judged.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass as plain_dataclass
from typing import Annotated, Any

from annotated_types import Ge, Le
from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from pipeline.acceptance.chat_judge import LEAST_STOPS, LEVEL, paired
from pipeline.acceptance.chat_prompts import CONVERSATIONS, Message
from pipeline.core.settings import STRICT
from pipeline.runners.prompts import eos_ids
from pipeline.runners.session import Session


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ChatSettings:
    """How much the chat probe asks.

    Attributes:
        prompts: How many conversations; 8 or more, so that a loss can be told from chance.
        max_new_tokens: Bound of an answer. One that reaches it did not end.
        min_source_stops: How many answers the source must end itself; with fewer the probe is
            inconclusive. 0 for a model that was never trained to end one.
    """

    prompts: Annotated[PositiveInt, Ge(8), Le(len(CONVERSATIONS))]
    max_new_tokens: PositiveInt
    min_source_stops: NonNegativeInt = LEAST_STOPS


@plain_dataclass(frozen=True, kw_only=True)
class Answer:
    """A greedy answer.

    Attributes:
        tokens: Without the end-of-sequence id; no more than the bound.
        stopped: It ended by itself, before the bound.
    """

    tokens: tuple[int, ...]
    stopped: bool


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
    own = tokenizer.eos_token_id
    return eos_ids(tokenizer) | (frozenset() if own is None else {own})


@plain_dataclass(frozen=True, kw_only=True)
class ChatProbe:
    """What is asked, and what ends an answer; made by `prepare`, which needs no model.

    Source and engine need not be loaded at the same time: `ask_source`, then `ask_engine` with its
    answers.

    Attributes:
        settings: How much is asked.
        source_tokenizer: Of the source's folder.
        engine_tokenizer: Of the engine's folder.
        source_eos: Ids that end an answer of the source.
        engine_eos: Ids that end an answer of the engine.
        asked: The conversations.
        left_out: Those that are not asked, with the reason.
    """

    settings: ChatSettings
    source_tokenizer: Any
    engine_tokenizer: Any
    source_eos: frozenset[int]
    engine_eos: frozenset[int]
    asked: tuple[Asked, ...]
    left_out: tuple[str, ...]

    @staticmethod
    def prepare(
        source_tokenizer: Any,
        engine_tokenizer: Any,
        settings: ChatSettings,
        *,
        context: int,
    ) -> ChatProbe:
        """Put the conversations through both templates.

        Left out is what the source's own template refuses (some know no system prompt), and what
        does not fit into the context: an answer that the context cuts off would look as if it had
        ended.

        Args:
            source_tokenizer: Of the source's folder.
            engine_tokenizer: Of the engine's folder.
            settings: How much is asked.
            context: Longest request of both, prompt and answer, tokens.
        """
        asked, left_out = [], []
        count = settings.prompts if source_tokenizer.chat_template else 0
        for name, messages in itertools.islice(CONVERSATIONS.items(), count):
            source = template_ids(source_tokenizer, messages)
            if source is None:
                left_out.append(f"{name}: the source's template refuses it")
                continue
            engine = template_ids(engine_tokenizer, messages)
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
        """The source's answer to each conversation of `asked`."""
        bound = self.settings.max_new_tokens
        return tuple(answer(session, one.source, bound, self.source_eos) for one in self.asked)

    def ask_engine(self, session: Session, source_answers: Sequence[Answer]) -> dict[str, Any]:
        """Ask the engine too; `chat_findings` judges what comes.

        Args:
            session: What ships.
            source_answers: Of `ask_source`.

        Returns:
            The report's `chat`; only `not_run` where the source has no chat template.
        """
        if not self.source_tokenizer.chat_template:
            return {"not_run": "the source has no chat template"}
        bound, ends = self.settings.max_new_tokens, self.engine_eos
        # What the engine's template refuses is told as a difference, and cannot be asked.
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
                    "source": _shown(source, self.source_tokenizer),
                    "engine": _shown(engine, self.engine_tokenizer),
                }
                for one, source, engine in pairs
            ],
        }


def template_ids(tokenizer: Any, messages: Sequence[Message]) -> tuple[int, ...] | None:
    """Token ids up to where the answer starts; None if the template refuses, or there is none."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        return None
    try:
        encoded = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_dict=True
        )
    except TemplateError:
        return None
    return tuple(int(token) for token in encoded["input_ids"])


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
    """Whether the engine goes on behind an id that it was told to end at; None: cannot be told.

    Models end few answers with any but one of their ids, so the others would not be tried. Here
    the last token of an answer is declared an end too: it must not come again.
    """
    for one, _, given in pairs:
        if one.engine and given.tokens:
            stop = given.tokens[-1]
            again = answer(session, one.engine, bound, ends | {stop})
            return stop in again.tokens
    return None


def _shown(given: Answer, tokenizer: Any) -> dict[str, Any]:
    return {
        "tokens": len(given.tokens),
        "stopped": given.stopped,
        "text": tokenizer.decode(list(given.tokens), skip_special_tokens=False),
    }
