"""Prompts, ends and text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.commands.generating import decode_pieces
from pipeline.runners.workload import chat_prompt, eos_ids


class Named:
    """A tokenizer as far as `eos_ids` looks at it."""

    def __init__(self, folder: Path, eos_token_id: int | None) -> None:
        self.name_or_path = str(folder)
        self.eos_token_id = eos_token_id


@pytest.mark.parametrize(
    ("declared", "own", "expected"),
    [
        ({"eos_token_id": [128001, 128008, 128009]}, 7, {128001, 128008, 128009}),
        ({"eos_token_id": 2}, 7, {2}),
        ({"eos_token_id": 0}, 7, {0}),
        ({}, 7, {7}),
        (None, 7, {7}),
        (None, None, set()),
    ],
)
def test_end_ids_are_the_generation_configs_else_the_tokenizers(
    tmp_path: Path, declared: dict[str, Any] | None, own: int | None, expected: set[int]
) -> None:
    if declared is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(declared))
    assert eos_ids(Named(tmp_path, own)) == expected


def test_chat_prompt_is_the_template_up_to_the_answer(tokenizer: Any) -> None:
    ids = chat_prompt(tokenizer, "Hello")
    shown = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids) == shown
    assert ids.count(tokenizer.bos_token_id) == 2  # the template's, and none added before it
    assert all(isinstance(token, int) for token in ids)


@pytest.mark.parametrize("text", ["ok 😀 né 漢字!", " leading", "🏳️‍🌈"])
def test_characters_of_several_tokens_come_whole(tokenizer: Any, text: str) -> None:
    tokens = tokenizer(text)["input_ids"]
    pieces = list(decode_pieces(tokenizer, iter(tokens)))
    assert "".join(pieces) == text == tokenizer.decode(tokens)
    assert not any("\ufffd" in piece for piece in pieces)
    if "😀" in text:
        assert len(tokenizer("😀")["input_ids"]) > 1
        assert any("😀" in piece for piece in pieces)


def test_special_tokens_and_half_characters_are_shown_as_the_full_decode(tokenizer: Any) -> None:
    cut = tokenizer("ok 😀")["input_ids"][:-1]
    assert "".join(decode_pieces(tokenizer, iter(cut))) == tokenizer.decode(cut)
    tokens = [tokenizer.bos_token_id, *tokenizer("Hi")["input_ids"], tokenizer.eos_token_id]
    assert "".join(decode_pieces(tokenizer, iter(tokens))) == "Hi"
