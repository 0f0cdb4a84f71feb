"""Random weights as a source: nothing is downloaded, and everything made of them says so."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.core.cache import digest_folder
from pipeline.core.values import Licence, Weights
from pipeline.model.hf import write_random_model
from pipeline.model.spec import ModelSpec

_TERMS = Licence(spdx="CC0-1.0", files=("LICENSE",), redistribution="allowed")


@dataclass(frozen=True, kw_only=True)
class RandomSource:
    """Writes a model of a shape into a folder.

    Attributes:
        shape: The model.
        folder: Where its files go.
        documents: Text for the tokenizer.
        seed: Of the weights.
    """

    shape: ModelSpec
    folder: Path
    documents: tuple[str, ...]
    seed: int = 0

    @property
    def terms(self) -> Licence:
        return _TERMS

    def fetch(self) -> Weights:
        """Write the model unless an earlier call did."""
        if not self.folder.exists():
            self.folder.mkdir(parents=True)
            write_random_model(
                self.shape, self.folder, documents=list(self.documents), seed=self.seed
            )
        return Weights(
            dir=self.folder,
            origin=f"random:{self.shape.architecture}",
            commit=None,
            files=digest_folder(self.folder),
            licence=_TERMS,
            note="a rehearsal: these weights are random numbers",
            random=True,
        )
