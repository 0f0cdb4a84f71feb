"""What a text is: documents with a digest; and the check that two texts do not overlap."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Annotated, Protocol, runtime_checkable

from pipeline.core.errors import Fault, RecipeError
from pipeline.core.kinds import OneOf
from pipeline.core.values import digest_of

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
        """All documents, in a fixed order.

        Raises:
            PipelineError: It cannot be had, or is empty.
        """
        ...


Text = Annotated[TextCorpus, OneOf("pipeline.sources.text")]
"""A section of a recipe that names a text."""


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
    """Refuse an evaluation text that the calibration has seen.

    Raises:
        RecipeError: They share a run of words; the message shows how many.
    """
    if shared := shared_ngrams(calibration, evaluation):
        message = (
            f"shares {shared} runs of {NGRAM_WORDS} words with the calibration text; "
            "a verdict needs text that calibration has not seen: choose another part or file"
        )
        raise RecipeError([Fault(config_path, message)])
