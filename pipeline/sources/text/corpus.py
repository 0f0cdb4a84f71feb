"""Text for calibration and evaluation: documents with a digest, cut into windows of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Protocol, runtime_checkable

from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from pipeline.core.errors import Fault, RecipeError
from pipeline.core.published import digest_of
from pipeline.core.settings import STRICT, OneOf

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NGRAM_WORDS = 13
"""Length of a shared run of words that counts as overlap: 13, as in GPT-3's contamination study
(arXiv:2005.14165, appendix C)."""


@runtime_checkable
class TextCorpus(Protocol):
    """A source of plain text for calibration or evaluation."""

    @property
    def origin(self) -> str:
        """Where it comes from, for people and for the record."""
        ...

    def documents(self) -> tuple[str, ...]:
        """All documents, in a fixed order; at least one."""
        ...


Text = Annotated[TextCorpus, OneOf("pipeline.sources.text")]
"""A section of a recipe that names a text."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Calibration:
    """Which text sets the activation scales."""

    text: Text
    calib_size: PositiveInt  # windows of `seq_len` tokens
    seq_len: PositiveInt
    batch_size: PositiveInt  # windows per forward pass
    seed: NonNegativeInt  # chooses the windows when the text holds more

    def inputs(self) -> dict[str, Any]:
        settings = ("calib_size", "seq_len", "batch_size", "seed")
        return {
            "text": text_digest(self.text.documents()),
            "calibration": {name: getattr(self, name) for name in settings},
        }

    def record(self) -> dict[str, str]:
        """Which text it was, for the calibration record."""
        return {"origin": self.text.origin, "digest": text_digest(self.text.documents())}

    def windows(self, tokenizer: Any) -> NDArray[np.int64]:
        """Tokens that calibration reads, [calib_size, seq_len]."""
        return pack_windows(
            self.text.documents(),
            tokenizer,
            seq_len=self.seq_len,
            count=self.calib_size,
            seed=self.seed,
        )


def pack_windows(
    documents: Sequence[str], tokenizer: Any, *, seq_len: int, count: int, seed: int | None
) -> NDArray[np.int64]:
    """Tokenize, join with the end-of-text token, cut into windows [count, seq_len].

    Full windows only, so that padding never enters a statistic. `seed` draws `count` of them at
    random, in text order; None takes the first. RecipeError if the text is too short.
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


def text_digest(documents: Iterable[str]) -> str:
    """SHA-256 (hex) that identifies a list of documents."""
    return digest_of([hashlib.sha256(text.encode()).hexdigest() for text in documents])


def ngrams(text: str) -> Iterator[bytes]:
    """Short digests of all runs of `NGRAM_WORDS` words."""
    words = text.split()
    for start in range(len(words) - NGRAM_WORDS + 1):
        run = " ".join(words[start : start + NGRAM_WORDS])
        yield hashlib.blake2b(run.encode(), digest_size=8).digest()


def shared_ngrams(first: Iterable[str], second: Iterable[str]) -> int:
    """How many different runs of `NGRAM_WORDS` words stand in both texts."""
    left, right = ({run for text in texts for run in ngrams(text)} for texts in (first, second))
    return len(left & right)


def require_disjoint(
    calibration: tuple[str, ...], evaluation: tuple[str, ...], config_path: str
) -> None:
    """Refuse an evaluation text that the calibration has seen: a `RecipeError` at `config_path`."""
    if shared := shared_ngrams(calibration, evaluation):
        message = (
            f"shares {shared} runs of {NGRAM_WORDS} words with the calibration text; "
            "a verdict needs text that calibration has not seen: choose another part or file"
        )
        raise RecipeError([Fault(config_path, message)])
