"""Text as windows of tokens: full windows only, so that padding never enters a statistic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import Fault, RecipeError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def pack_windows(
    documents: Sequence[str], tokenizer: Any, *, seq_len: int, count: int, seed: int | None
) -> NDArray[np.int64]:
    """Tokenize, join with the end-of-text token, cut into full windows [count, seq_len].

    Args:
        documents: The text.
        tokenizer: A Transformers tokenizer.
        seq_len: Tokens per window.
        count: Windows wanted.
        seed: Draws `count` of the windows at random, in text order; None takes the first.

    Raises:
        RecipeError: The text is too short.
    """
    import numpy as np

    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens: list[int] = []
    for encoded in tokenizer(list(documents), add_special_tokens=False)["input_ids"]:
        tokens += encoded + separator
    available = len(tokens) // seq_len
    if available < count:
        message = (
            f"the text has {len(tokens)} tokens, {available} windows of {seq_len}; {count} are "
            "wanted: use a longer text or fewer windows"
        )
        raise RecipeError([Fault("text", message)])
    windows = np.array(tokens[: available * seq_len], np.int64).reshape(available, seq_len)
    if seed is None:
        return windows[:count]
    chosen = np.random.default_rng(seed).permutation(available)[:count]
    return windows[np.sort(chosen)]
