"""The text that sets the activation scales."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from pipeline.core.settings import STRICT
from pipeline.sources.text.corpus import Text, text_digest
from pipeline.sources.text.windows import pack_windows

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Calibration:
    """Which text sets the activation scales.

    Attributes:
        text: Where it comes from.
        calib_size: Windows of `seq_len` tokens; full windows only, since padding would enter amax.
        seq_len: Tokens per window.
        batch_size: Windows per forward pass.
        seed: Chooses the windows when the text holds more.
    """

    text: Text
    calib_size: PositiveInt
    seq_len: PositiveInt
    batch_size: PositiveInt
    seed: NonNegativeInt

    def inputs(self) -> dict[str, Any]:
        """Everything about it that shapes scales."""
        return {
            "text": text_digest(self.text.documents()),
            "calibration": {
                "calib_size": self.calib_size,
                "seq_len": self.seq_len,
                "batch_size": self.batch_size,
                "seed": self.seed,
            },
        }

    def record(self) -> dict[str, str]:
        """Which text it was, for the calibration record."""
        return {"origin": self.text.origin, "digest": text_digest(self.text.documents())}

    def windows(self, tokenizer: Any) -> NDArray[np.int64]:
        """Tokens that calibration reads, [calib_size, seq_len].

        Raises:
            RecipeError: The text is too short.
        """
        return pack_windows(
            self.text.documents(),
            tokenizer,
            seq_len=self.seq_len,
            count=self.calib_size,
            seed=self.seed,
        )
