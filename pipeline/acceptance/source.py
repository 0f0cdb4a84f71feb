"""What the source model says, computed once and kept: figures of the windows, and chat answers.

An engine is always compared with the same numbers, and the source need not be loaded beside it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.acceptance.chat_probe import Answer, ChatProbe
from pipeline.acceptance.quality import SourceFigures, load_figures, save_figures, source_figures
from pipeline.core.cache import StageCache
from pipeline.core.stages import Stage
from pipeline.core.values import Weights
from pipeline.runners.session import Session

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

FIGURES = Stage(
    name="source-logits", version=1, code=("pipeline.acceptance.quality", "pipeline.runners")
)
CHAT = Stage(
    name="source-chat", version=1, code=("pipeline.acceptance.chat_probe", "pipeline.runners")
)
_ANSWERS = "answers.json"


class Source:
    """The source model; loaded when something is asked that is not kept yet.

    Args:
        weights: The model.
        cache: Where its answers are kept.
        opener: Loads it.
        runtime: Names what executes it: other runtimes, other numbers.
    """

    def __init__(
        self,
        weights: Weights,
        cache: StageCache,
        opener: Callable[[], AbstractContextManager[Session]],
        runtime: str,
    ) -> None:
        self._weights = weights
        self._cache = cache
        self._opener = opener
        self._key = {
            "weights": weights.digest,
            "runtime": runtime,
            "tools": {name: version(name) for name in ("torch", "transformers")},
        }
        self._stack = ExitStack()
        self._opened: Session | None = None

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    @property
    def session(self) -> Session:
        """The loaded model."""
        if self._opened is None:
            self._opened = self._stack.enter_context(self._opener())
        return self._opened

    def figures(self, windows: NDArray[np.int64]) -> SourceFigures:
        """What it says about every window."""
        result = self._cache.run(
            FIGURES,
            {
                **self._key,
                "windows": hashlib.sha256(windows.tobytes()).hexdigest(),
            },
            lambda out: save_figures(source_figures(self.session.logits, windows)[0], out),
        )
        return load_figures(SourceFigures, result.dir)

    def chat(self, probe: ChatProbe) -> tuple[Answer, ...]:
        """Its answers to the conversations of the chat probe."""
        result = self._cache.run(
            CHAT,
            {
                **self._key,
                "prompts": [list(one.source) for one in probe.asked],
                "max_new_tokens": probe.settings.max_new_tokens,
                "eos": sorted(probe.source_eos),
            },
            lambda out: self._write_answers(probe, out),
        )
        return tuple(
            Answer(tokens=tuple(given["tokens"]), stopped=given["stopped"])
            for given in result.read_json(_ANSWERS)
        )

    def _write_answers(self, probe: ChatProbe, out: Path) -> None:
        log.info("The source answers %d chat prompts", len(probe.asked))
        answers = [asdict(given) for given in probe.ask_source(self.session)]
        (out / _ANSWERS).write_text(json.dumps(answers))
