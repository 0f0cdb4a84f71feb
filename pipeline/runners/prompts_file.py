"""Prompts of a workload from a JSON-lines file.

Each line is an object with one of two keys: `{"prompt": "text"}`, which the model's tokenizer turns
into ids with the special tokens that it adds by itself and without a chat template, or
`{"token_ids": [1, 2, 3]}`. Empty lines are skipped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import Fault, RecipeError

_KEYS = ("prompt", "token_ids")


@dataclass(frozen=True, kw_only=True)
class FilePrompt:
    """One line: text or token ids.

    Attributes:
        line: Its number in the file, from 1.
        text: For the tokenizer; empty where there are ids.
        token_ids: Empty where there is text.
    """

    line: int
    text: str = ""
    token_ids: tuple[int, ...] = ()


def read_prompts(path: Path, config_path: str) -> tuple[FilePrompt, ...]:
    """All prompts of a file, not yet tokenized.

    Args:
        path: The file.
        config_path: Of the setting that names it, for messages.

    Raises:
        RecipeError: It cannot be read, is empty, or a line is not a prompt.
    """
    try:
        # Not splitlines: it also splits at U+2028, which JSON allows inside a string.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise _fault(config_path, f"{path} cannot be read as UTF-8 text: {error}") from error
    prompts = tuple(
        _prompt_of(line, number, path, config_path)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    )
    if not prompts:
        raise _fault(config_path, f"{path} has no prompts; write one JSON object on each line")
    return prompts


def _prompt_of(line: str, number: int, path: Path, config_path: str) -> FilePrompt:
    where = f"{path} line {number}"
    try:
        found: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise _fault(config_path, f"{where} is not JSON: {error}") from error
    keys = sorted(found) if isinstance(found, dict) else []
    if keys not in ([_KEYS[0]], [_KEYS[1]]):
        shown = f"the keys {keys}" if keys else "no object"
        raise _fault(
            config_path, f'{where} has {shown}; wanted {{"prompt": "text"}} or {{"token_ids": […]}}'
        )
    value = found[keys[0]]
    if keys == ["prompt"]:
        if not isinstance(value, str) or not value:
            raise _fault(config_path, f"{where}: prompt is {value!r}, wanted text")
        return FilePrompt(line=number, text=value)
    ids = value if isinstance(value, list) else []
    # bool is an int for isinstance.
    if not ids or any(type(token) is not int or token < 0 for token in ids):
        raise _fault(config_path, f"{where}: token_ids must be a list of one or more numbers >= 0")
    return FilePrompt(line=number, token_ids=tuple(ids))


def tokenized(
    prompts: Sequence[FilePrompt],
    path: Path,
    config_path: str,
    *,
    isl: int,
    vocab_size: int | None,
    tokenizer: Any | None,
) -> tuple[tuple[int, ...], ...]:
    """Token ids of prompts, held against the workload.

    Args:
        prompts: Of `read_prompts`.
        path: Their file, for messages.
        config_path: Of the setting that names it.
        isl: Longest prompt allowed, tokens.
        vocab_size: Ids must be below it; None to leave that unchecked.
        tokenizer: For prompts that are text; None where it is not there yet: they are skipped.

    Raises:
        RecipeError: With all prompts that are too long, empty, or not of the vocabulary.
    """
    made, faults = [], []
    for prompt in prompts:
        ids = prompt.token_ids
        if prompt.text:
            if tokenizer is None:
                continue
            ids = tuple(tokenizer(prompt.text)["input_ids"])
        where = f"{path} line {prompt.line}"
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
