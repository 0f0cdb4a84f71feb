"""The chat probe finds engines that do not end where their source does."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.acceptance.chat import (
    LEAST_STOPS,
    LEVEL,
    ChatProbe,
    ChatSettings,
    chance_of_loss,
    chat_findings,
)
from pipeline.model.hf import load_tokenizer
from pipeline.runners.onnxruntime import graph_session
from pipeline.runners.runner import Session
from pipeline.runners.transformers import open_source
from tests.acceptance.questions import Stub
from tests.formats.decoder.decoders import open_graph, write_graph
from tests.tiny import tiny_model, tiny_tokenizer

CONTEXT = 512
SETTINGS = ChatSettings(prompts=24, max_new_tokens=12)
NOTHING: frozenset[int] = frozenset()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose context holds the conversations."""
    return tiny_model(tmp_path_factory.mktemp("model"), max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def source(model_dir: Path) -> Iterator[Session]:
    with open_source(model_dir) as session:
        yield session


@pytest.fixture(scope="module")
def engine(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Session:
    """The same model as a graph."""
    out = tmp_path_factory.mktemp("graph")
    return graph_session(open_graph(write_graph(model_dir, out, context=CONTEXT)))


@pytest.fixture(scope="module")
def ends(model_dir: Path, source: Session) -> tuple[int, ...]:
    """Declared in the folder: tokens at which most answers of this random model come to an end."""
    tokenizer = load_tokenizer(model_dir)
    asked = ChatProbe.prepare(tokenizer, tokenizer, SETTINGS, context=CONTEXT)
    asked = dataclasses.replace(asked, source_eos=NOTHING)
    answers = [given.tokens for given in asked.ask_source(source)]
    assert len(answers) == 24
    chosen: list[int] = []
    while sum(not set(tokens).isdisjoint(chosen) for tokens in answers) < 16:
        open_ended = [tokens for tokens in answers if set(tokens).isdisjoint(chosen)]
        # Not the first token: an answer should have one.
        found = Counter(token for tokens in open_ended for token in set(tokens[2:]))
        chosen.append(found.most_common(1)[0][0])
    assert len(chosen) > 1
    declare(model_dir, [2, *chosen])
    return (2, *chosen)


def declare(folder: Path, ids: Sequence[int]) -> None:
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": list(ids)}))


def engine_dir(model_dir: Path, folder: Path) -> Path:
    shutil.copytree(model_dir, folder / "engine")
    return folder / "engine"


def ask(source: Session, engine: Session, source_dir: Path, engine_dir: Path) -> dict[str, Any]:
    tokenizers = load_tokenizer(source_dir), load_tokenizer(engine_dir)
    asked = ChatProbe.prepare(*tokenizers, SETTINGS, context=CONTEXT)
    return dict(json.loads(json.dumps(asked.ask_engine(engine, asked.ask_source(source)))))


def told(chat: dict[str, Any]) -> list[tuple[str, str]]:
    return [(finding.kind, finding.message) for finding in chat_findings(chat)]


Streaming = Callable[[Sequence[int], int, frozenset[int]], Iterator[int]]


@dataclass
class Changed(Stub):
    """A session whose streams are others; nothing else of it is asked."""

    streaming: Streaming

    def stream(
        self, prompt: Sequence[int], max_new_tokens: int, eos_token_ids: frozenset[int]
    ) -> Iterator[int]:
        return self.streaming(prompt, max_new_tokens, eos_token_ids)


def never_stops(*_: object) -> Iterator[int]:
    return itertools.cycle([7, 8])


def deaf_to_ends(session: Session) -> Streaming:
    """Weights that lost the end: what would be one is another token."""

    def stream(prompt: Sequence[int], bound: int, ends: frozenset[int]) -> Iterator[int]:
        other = next(token for token in range(320) if token not in ends)
        for token in session.stream(prompt, bound, NOTHING):
            yield other if token in ends else token

    return stream


def test_engine_that_ends_like_its_source_passes(
    source: Session, engine: Session, model_dir: Path, ends: tuple[int, ...]
) -> None:
    chat = ask(source, engine, model_dir, model_dir)
    assert told(chat) == []
    assert chat["prompts"] == len(chat["answers"]) == 24
    assert chat["eos"] == {"source": sorted(ends), "engine": sorted(ends), "missing": []}
    assert chat["stopped"]["source"] == chat["stopped"]["engine"] >= 16
    assert chat["stopped"]["lost"] == 0
    assert chat["stop_id_ignored"] is False
    lengths = [one["engine"]["tokens"] for one in chat["answers"]]
    assert max(lengths) == SETTINGS.max_new_tokens
    assert [one["engine"]["stopped"] for one in chat["answers"]] == [n < 12 for n in lengths]
    assert all(one["source"] == one["engine"] for one in chat["answers"])
    assert any(one["engine"]["text"] for one in chat["answers"])


def test_engine_folder_without_one_of_the_end_ids_is_a_regression(
    source: Session, engine: Session, model_dir: Path, ends: tuple[int, ...], tmp_path: Path
) -> None:
    folder = engine_dir(model_dir, tmp_path)
    declare(folder, ends[:-1])
    chat = ask(source, engine, model_dir, folder)
    kinds, messages = zip(*told(chat), strict=True)
    assert set(kinds) == {"regression"}
    assert f"does not declare the source's end-of-sequence ids [{ends[-1]}]" in messages[0]
    assert "an end-of-sequence id stands inside" in messages[1]
    assert chat["eos_inside"]


def test_changed_template_is_a_regression_that_names_the_prompts(
    source: Session, engine: Session, model_dir: Path, ends: tuple[int, ...], tmp_path: Path
) -> None:
    folder = engine_dir(model_dir, tmp_path)
    path = folder / "chat_template.jinja"
    template = path.read_text()
    # Only a system prompt is laid out otherwise: a probe of one user message would not see it.
    changed = template.replace("{{ message['content'] }}", "{{ message['content'] | trim }}")
    changed = changed.replace(
        "<|im_start|>{{ message['role'] }}",
        "<|im_start|>{{ 'user' if message['role'] == 'system' else message['role'] }}",
    )
    path.write_text(changed)
    ((kind, message), *_) = told(ask(source, engine, model_dir, folder))
    assert kind == "regression"
    assert "gives other tokens" in message
    assert "2 (brief, role) of 24 prompts" in message


def test_engine_that_never_stops_is_a_regression_and_does_not_hang_the_probe(
    source: Session, engine: Session, model_dir: Path, ends: tuple[int, ...]
) -> None:
    chat = ask(source, Changed(never_stops), model_dir, model_dir)
    assert {one["engine"]["tokens"] for one in chat["answers"]} == {12}
    messages = [message for kind, message in told(chat) if kind == "regression"]
    assert "went on behind a token id that it was told to end at" in messages[0]
    stopped = chat["stopped"]["source"]
    assert f"0 of 24 answers ended by themselves, {stopped} of the source's" in messages[1]


def test_weights_that_lost_the_end_are_a_regression_by_the_count_alone(
    source: Session, engine: Session, model_dir: Path, ends: tuple[int, ...]
) -> None:
    ((kind, message),) = told(ask(source, Changed(deaf_to_ends(engine)), model_dir, model_dir))[-1:]
    assert kind == "regression"
    assert "answers ended by themselves" in message


def test_source_that_ends_too_few_answers_shows_nothing(
    source: Session, engine: Session, model_dir: Path
) -> None:
    tokenizer = load_tokenizer(model_dir)
    never = frozenset({319})
    for least, expected in ((LEAST_STOPS, ["inconclusive"]), (0, [])):
        settings = ChatSettings(prompts=20, max_new_tokens=2, min_source_stops=least)
        asked = ChatProbe.prepare(tokenizer, tokenizer, settings, context=CONTEXT)
        asked = dataclasses.replace(asked, source_eos=never, engine_eos=never)
        chat = asked.ask_engine(engine, asked.ask_source(source))
        assert [kind for kind, _ in told(chat)] == expected
        assert chat["stopped"]["source"] == 0


def test_source_without_a_template_is_not_asked(engine: Session) -> None:
    plain = tiny_tokenizer()
    plain.chat_template = None
    chat = ChatProbe.prepare(plain, plain, SETTINGS, context=CONTEXT).ask_engine(engine, ())
    assert told(chat) == [("note", "not run: chat probe: the source has no chat template")]


def test_what_does_not_fit_or_is_refused_is_left_out_with_the_reason(model_dir: Path) -> None:
    tokenizer = load_tokenizer(model_dir)
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + tokenizer.chat_template
    )
    whole = ChatProbe.prepare(tokenizer, tokenizer, SETTINGS, context=CONTEXT)
    assert [line.split(":")[0] for line in whole.left_out] == ["brief", "role"]
    longest = max(len(one.source) for one in whole.asked) + SETTINGS.max_new_tokens
    tight = ChatProbe.prepare(tokenizer, tokenizer, SETTINGS, context=longest)
    assert tight == whole
    tighter = ChatProbe.prepare(tokenizer, tokenizer, SETTINGS, context=longest - 1)
    assert len(tighter.asked) == len(whole.asked) - 1
    assert f"{longest} tokens, the context has {longest - 1}" in " ".join(tighter.left_out)


@pytest.mark.parametrize(
    ("lost", "gained", "ways"), [(0, 0, 1), (4, 0, 1), (5, 0, 1), (7, 1, 9), (7, 2, 46), (1, 3, 15)]
)
def test_chance_of_a_loss_is_the_exact_binomial(lost: int, gained: int, ways: int) -> None:
    assert chance_of_loss(lost, gained) == ways / 2 ** (lost + gained)


@pytest.mark.parametrize(
    ("lost", "gained", "kinds"),
    [(4, 0, []), (5, 0, ["regression"]), (7, 1, ["regression"]), (7, 2, []), (0, 9, [])],
)
def test_losses_beyond_chance_are_a_regression(lost: int, gained: int, kinds: list[str]) -> None:
    chat = {
        "prompts": 24, "left_out": [], "max_new_tokens": 12, "level": LEVEL,
        "min_source_stops": LEAST_STOPS, "eos": {"source": [2], "engine": [2], "missing": []},
        "template_differs": [], "stop_id_ignored": None, "eos_inside": [], "answers": [{}] * 24,
        "stopped": {
            "source": 10 + lost, "engine": 10 + gained, "lost": lost, "gained": gained,
            "p_value": chance_of_loss(lost, gained),
        },
        "not_empty": {"source": 24, "engine": 24, "lost": 0, "gained": 0, "p_value": 1.0},
    }  # fmt: skip
    assert [finding.kind for finding in chat_findings(chat)] == kinds
