"""The FP8 reference: what the checkpoint itself says, and how far it is from itself.

An engine differs from its source by FP8, which is in the checkpoint, and by what a runtime makes of
the checkpoint. The reference tells the two apart: the checkpoint simulated in float32 PyTorch
(`pipeline.quant.simulate`), which has the first difference and not the second.

Two right runtimes of one FP8 checkpoint never agree token by token: sums in another order move a
value over the edge of an FP8 code, and all later layers differ. So the engine is held against the
reference's distance from itself, its linears summed from the last input to the first.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.acceptance.quality import (
    EngineFigures,
    SourceFigures,
    agreement,
    figures_against,
    load_figures,
    save_figures,
    source_figures,
    summarize_quality,
)
from pipeline.core.cache import StageCache
from pipeline.core.stages import Stage

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

STAGE = Stage(
    name="reference-logits",
    version=1,
    code=(
        "pipeline.acceptance.quality",
        "pipeline.acceptance.reference",
        "pipeline.quant.simulate",
        "pipeline.runners",
    ),
)
_AGAINST_SOURCE, _NOISE = "source-", "noise-"


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The checkpoint's own figures.

    Attributes:
        figures: Of the first windows.
        against_source: The checkpoint against the source, on the same windows.
        noise: The checkpoint, its sums rounded otherwise, against itself; on the same windows.
    """

    figures: SourceFigures
    against_source: EngineFigures
    noise: EngineFigures

    def to_json(self, source: SourceFigures, engine: EngineFigures, seed: int) -> dict[str, Any]:
        """The report's `fp8_reference`.

        Args:
            source: The source model's figures.
            engine: The engine against this reference.
            seed: Of the bootstrap.
        """
        few = len(self.against_source.kl)
        own = summarize_quality(source.nll[:few], self.against_source, seed)
        return {
            "windows": few,
            "perplexity": own["engine_perplexity"],
            **{key: own[key] for key in ("perplexity_change", "mean_kl_nats", "top1_agreement")},
            "engine": agreement(engine, seed),
            "noise_floor": agreement(self.noise, seed),
        }


def reference_of(
    checkpoint_dir: Path,
    digest: str,
    windows: NDArray[np.int64],
    source: SourceFigures,
    context: int,
    cache: StageCache,
) -> Reference:
    """Simulate a checkpoint over the windows [W, N], or take what an earlier run kept.

    Args:
        checkpoint_dir: Unified checkpoint.
        digest: Names its bytes.
        windows: Held-out text; no more windows than the source's figures.
        source: The source's figures of these windows, and perhaps of more.
        context: Of the engine, tokens.
        cache: Where the figures are kept.
    """
    result = cache.run(
        STAGE,
        {
            "checkpoint": digest,
            "context": context,
            "windows": hashlib.sha256(windows.tobytes()).hexdigest(),
            "source": hashlib.sha256(source.nll.tobytes()).hexdigest(),
            "tools": {name: version(name) for name in ("torch", "transformers")},
        },
        lambda out: _write(checkpoint_dir, windows, source, context, out),
    )
    return Reference(
        figures=load_figures(SourceFigures, result.dir),
        against_source=load_figures(EngineFigures, result.dir, _AGAINST_SOURCE),
        noise=load_figures(EngineFigures, result.dir, _NOISE),
    )


def _write(
    checkpoint_dir: Path,
    windows: NDArray[np.int64],
    source: SourceFigures,
    context: int,
    out: Path,
) -> None:
    from pipeline.quant.simulate import load_simulation
    from pipeline.runners.transformers import TransformersSession

    # One at a time: each takes 4 bytes a parameter.
    session = TransformersSession(load_simulation(checkpoint_dir, context=context))
    own, (against,) = source_figures(session.logits, windows, "Checkpoint", [source])
    save_figures(own, out)
    save_figures(against, out, _AGAINST_SOURCE)
    del session
    again = load_simulation(checkpoint_dir, context=context, accumulate="float32-reversed")
    session = TransformersSession(again)
    (noise,) = figures_against(session.logits, windows, [own], "Noise floor")
    save_figures(noise, out, _NOISE)
