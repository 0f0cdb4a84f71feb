"""A session as `lm_eval` sees a model. Import it only where that library is installed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from numpy.typing import NDArray

from pipeline.acceptance.chat import end_ids
from pipeline.acceptance.quality import log_softmax
from pipeline.core.errors import PipelineError
from pipeline.core.progress import progress
from pipeline.model.hf import chat_text
from pipeline.runners.runner import Session

Scored = tuple[float, bool]
"""Log-likelihood in nats, and whether greedy decoding would have said the same."""
_BOUNDS = ("max_gen_toks", "max_new_tokens", "max_tokens")
_DEFAULT_BOUND = 256
"""The library's own for a task that names no bound (lm_eval.models.huggingface, 0.4.13)."""


def _shown(requests: Sequence[Any]) -> Iterator[Any]:
    with progress("lm-eval", len(requests), "requests") as done:
        for request in requests:
            yield request
            done(1)


class SessionModel(TemplateLM):  # type: ignore[misc]  # the library has no types
    """`lm_eval.api.model.LM` on a session: one request at a time, greedy only.

    Splitting a text into context and continuation is the library's (`TemplateLM`), so that figures
    compare with those of its own models. `truncated` counts requests that lost their start, so that
    they fit into the `context`, in tokens.
    """

    def __init__(self, session: Session, tokenizer: Any, context: int) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.truncated = 0
        self._session = session
        self._context = context
        self._ends = end_ids(tokenizer)
        self._last: tuple[list[int], NDArray[np.float32]] | None = None

    @property
    def max_length(self) -> int:
        """Most tokens whose logits are asked for; a session may need room for one more."""
        return self._context - 1

    @property
    def eot_token_id(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise PipelineError("lm_eval needs a tokenizer with an end-of-sequence token")
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it: the begin, else the end token."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        text = chat_text(
            self.tokenizer,
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        if text is None:
            raise PipelineError("lm_eval: the chat template refuses a question; do without it")
        return text

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids; a text that begins with the begin token already gets no second one."""
        begin = self.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = not (begin and string.startswith(begin))
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[Scored]:
        return [
            self._score(context or [self.prefix_token_id], continuation)
            for _texts, context, continuation in _shown(requests)
        ]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        totals = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            totals.append(sum(self._score(*make_disjoint_window(one))[0] for one in windows))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        return [self._generate(*request.args) for request in _shown(requests)]

    def _score(self, context: Sequence[int], continuation: Sequence[int]) -> Scored:
        count = len(continuation)
        if not 1 <= count <= self.max_length:
            raise PipelineError(
                f"lm_eval asks for the likelihood of {count} tokens, 1 to {self.max_length} are "
                "possible; take another task, or an engine with a longer context"
            )
        whole = [*context, *continuation]
        # The last token is only predicted: nothing follows it.
        given = whole[-(self.max_length + 1) : -1]
        self.truncated += len(given) < len(whole) - 1
        rows = self._logprobs(given)[-count:]
        value = float(rows[np.arange(count), list(continuation)].sum())
        return value, bool((rows.argmax(axis=-1) == np.array(continuation)).all())

    def _logprobs(self, tokens: list[int]) -> NDArray[np.float32]:
        """Log-probabilities; the choices of one question often share all tokens but the last."""
        if self._last is None or self._last[0] != tokens:
            self._last = tokens, log_softmax(self._session.logits(tokens))
        return self._last[1]

    def _generate(self, prompt: str, options: dict[str, Any]) -> str:
        if options.get("do_sample") or options.get("temperature"):
            raise PipelineError(
                f"lm_eval's task wants sampled answers ({options}); sessions answer greedily only, "
                "take a task without do_sample and temperature"
            )
        bound = next((int(options[key]) for key in _BOUNDS if key in options), _DEFAULT_BOUND)
        if bound >= self._context:
            raise PipelineError(
                f"lm_eval's task wants answers of {bound} tokens, the context has "
                f"{self._context}; take an engine with a longer one"
            )
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        tokens = self.tok_encode(prompt) or [self.prefix_token_id]
        given = tokens[-(self._context - bound) :]
        self.truncated += len(given) < len(tokens)
        produced: list[int] = []
        text = ""
        stream = self._session.stream(given, bound, self._ends)
        for token in stream:
            produced.append(token)
            text = self.tokenizer.decode(produced, skip_special_tokens=True)
            if any(stop and stop in text for stop in stops):
                break
        if close := getattr(stream, "close", None):
            close()
        ends = [text.index(stop) for stop in stops if stop and stop in text]
        return text[: min(ends)] if ends else text
