"""Prompts: of a JSON-lines file, or of a chat; and what ends answers.

Each line of a file is an object with one of two keys: `{"prompt": "text"}`, which the model's
tokenizer turns into ids with the special tokens that it adds by itself and without a chat template,
or `{"token_ids": [1, 2, 3]}`. Empty lines are skipped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from annotated_types import MinLen
from pydantic import ConfigDict, NonNegativeInt, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from pipeline.core.errors import Fault, RecipeError

_WANTED = 'wanted {"prompt": "text"} or {"token_ids": [1, 2, 3]}'


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class FilePrompt:
    """One line: text for the tokenizer, or token ids."""

    prompt: Annotated[str, MinLen(1)] | None = None
    token_ids: Annotated[tuple[NonNegativeInt, ...], MinLen(1)] | None = None

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.token_ids is None):
            raise ValueError("it has both keys or none")


_LINE = TypeAdapter(FilePrompt)


def read_prompts(path: Path, config_path: str) -> tuple[tuple[int, FilePrompt], ...]:
    """All prompts of a file with the numbers of their lines, not yet tokenized.

    Raises:
        RecipeError: At `config_path`: it cannot be read, is empty, or a line is not a prompt.
    """
    try:
        # Not splitlines: it also splits at U+2028, which JSON allows inside a string.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise _fault(config_path, f"{path} cannot be read as UTF-8 text: {error}") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                prompts.append((number, _LINE.validate_json(line)))
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                at = ".".join(["", *map(str, first["loc"])])
                message = f"{path} line {number}{at}: {first['msg']}; {_WANTED}"
                raise _fault(config_path, message) from error
    if not prompts:
        raise _fault(config_path, f"{path} has no prompts; write one JSON object on each line")
    return tuple(prompts)


def tokenize(
    prompts: Sequence[tuple[int, FilePrompt]],
    path: Path,
    config_path: str,
    *,
    isl: int,
    vocab_size: int | None,
    tokenizer: Any,
) -> tuple[tuple[int, ...], ...]:
    """Token ids of prompts of `read_prompts`; without a tokenizer text is skipped.

    Raises:
        RecipeError: With all prompts that are too long, empty, or not below `vocab_size`.
    """
    made, faults = [], []
    for line, prompt in prompts:
        if prompt.token_ids is None and tokenizer is None:
            continue
        ids = prompt.token_ids or tuple(tokenizer(prompt.prompt)["input_ids"])
        where = f"{path} line {line}"
        if not 1 <= len(ids) <= isl:
            faults.append(f"{where} has {len(ids)} tokens, isl allows 1 to {isl}")
        elif vocab_size is not None and max(ids) >= vocab_size:
            faults.append(f"{where} has token id {max(ids)}, the vocabulary ends at {vocab_size}")
        made.append(ids)
    if faults:
        raise RecipeError([Fault(config_path, message) for message in faults])
    return tuple(made)


def _fault(config_path: str, message: str) -> RecipeError:
    return RecipeError([Fault(config_path, message)])


def chat_prompt(tokenizer: Any, message: str) -> list[int]:
    """Token ids of one user message in the chat template, up to where the answer starts.

    A tokenizer without a template gets the plain text.
    """
    if not tokenizer.chat_template:
        plain: list[int] = tokenizer(message)["input_ids"]
        return plain
    encoded = tokenizer.apply_chat_template(
        [{"role": "user", "content": message}], add_generation_prompt=True, return_dict=True
    )
    return list(encoded["input_ids"])


def eos_ids(tokenizer: Any) -> frozenset[int]:
    """Every id that ends an answer: those of `generation_config.json`, else the tokenizer's."""
    path = Path(tokenizer.name_or_path) / "generation_config.json"
    declared = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
    if declared is None:
        declared = tokenizer.eos_token_id
    ids = declared if isinstance(declared, list) else [declared]
    return frozenset(one for one in ids if one is not None)
