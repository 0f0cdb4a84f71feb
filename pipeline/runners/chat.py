"""Chat as the model was trained for it: its own template, and every end-of-sequence id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


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
    """Every id that ends an answer: those of `generation_config.json`, else the tokenizer's.

    `eos_token_id` may be one id or a list, such as Llama 3.1's three.
    """
    path = Path(tokenizer.name_or_path) / "generation_config.json"
    declared = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
    if declared is None:
        declared = tokenizer.eos_token_id
    if declared is None:
        return frozenset()
    return frozenset(declared if isinstance(declared, list) else [declared])
