"""Holds a session of this package in a child process, so that device memory ends with it."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def load(opener: str, **arguments: Any) -> SessionModel:
    """Open a session.

    Args:
        opener: `module:function`, which gives a context manager of a session.
        arguments: Of the function, as JSON has them.
    """
    module, _, function = opener.partition(":")
    return SessionModel(getattr(import_module(module), function)(**arguments))


class SessionModel:
    """`pipeline.runners.children.main.Model` on a `pipeline.runners.session.Session`."""

    def __init__(self, opened: Any) -> None:
        self._stack = ExitStack()
        self._session = self._stack.enter_context(opened)
        self.context: int | None = getattr(self._session, "context", None)

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        values: NDArray[np.float32] = self._session.logits(tokens)
        return values

    def generate(
        self, prompts: Sequence[Sequence[int]], osl: int, options: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        from pipeline.runners.session import BatchOptions

        asked = None if options is None else BatchOptions(**options)
        made = self._session.generate(prompts, osl, asked)
        rows = zip(made.tokens.tolist(), made.output_lengths, strict=True)
        return {
            "tokens": [row[:length] for row, length in rows],
            "ttft_s": made.ttft_s,
            "total_s": made.total_s,
            "requests": [asdict(request) for request in made.requests],
        }

    def stream(
        self, prompt: Sequence[int], max_new_tokens: int, eos_token_ids: Sequence[int]
    ) -> Generator[int, None, None]:
        yield from self._session.stream(prompt, max_new_tokens, frozenset(eos_token_ids))

    def clear_cache(self) -> None:
        self._session.clear_cache()

    def close(self) -> None:
        self._stack.close()
