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
    between,
    engine_figures,
    read_source_figures,
    summarize_quality,
    write_source_figures,
)
from pipeline.core.cache import StageCache, source_digest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_NOISE_WINDOWS = 8
"""Enough for a mean: the floor of SmolLM2 is 0.0048 nats with 95 % within a fifth of it
(docs/benchmarks.md)."""
_NLL, _KL, _AGREES = "noise-nll.npy", "noise-kl.npy", "noise-agrees.npy"


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The checkpoint's own figures.

    Attributes:
        figures: Of every window.
        noise: The checkpoint, its sums rounded otherwise, against itself; of the first windows.
    """

    figures: SourceFigures
    noise: EngineFigures

    def to_json(self, source: SourceFigures, engine: EngineFigures, seed: int) -> dict[str, Any]:
        """The report's `fp8_reference`.

        Args:
            source: The source model's figures.
            engine: The engine against this reference.
            seed: Of the bootstrap.
        """
        told = summarize_quality(source.nll, between(source, self.figures), seed)
        return {
            "perplexity": told["engine_perplexity"],
            **{key: told[key] for key in ("perplexity_change", "mean_kl_nats", "top1_agreement")},
            "engine": agreement(engine, seed),
            "noise_floor": {"windows": len(self.noise.kl), **agreement(self.noise, seed)},
        }


def reference_of(
    checkpoint_dir: Path, digest: str, windows: NDArray[np.int64], context: int, cache: StageCache
) -> Reference:
    """Simulate a checkpoint over the windows [W, N], or take what an earlier run kept.

    Args:
        checkpoint_dir: Unified FP8 checkpoint.
        digest: Names its bytes.
        windows: Held-out text.
        context: Of the engine, tokens.
        cache: Where the figures are kept.
    """
    import numpy as np

    result = cache.run(
        "reference-logits",
        {
            "checkpoint": digest,
            "context": context,
            "windows": hashlib.sha256(windows.tobytes()).hexdigest(),
            "tools": {name: version(name) for name in ("torch", "transformers")},
            "code": source_digest(
                "pipeline.acceptance.quality",
                "pipeline.acceptance.reference",
                "pipeline.quant.simulate",
                "pipeline.runners",
            ),
        },
        lambda out: _write(checkpoint_dir, windows, context, out),
    )
    return Reference(
        figures=read_source_figures(result.dir),
        noise=EngineFigures(
            nll=np.load(result.dir / _NLL),
            kl=np.load(result.dir / _KL),
            agrees=np.load(result.dir / _AGREES),
        ),
    )


def _write(checkpoint_dir: Path, windows: NDArray[np.int64], context: int, out: Path) -> None:
    import numpy as np

    from pipeline.quant.simulate import load_simulation
    from pipeline.runners.transformers import TransformersSession

    # One at a time: each takes 4 bytes a parameter.
    model = load_simulation(checkpoint_dir, context=context)
    write_source_figures(TransformersSession(model), windows, out, "FP8 reference")
    del model
    model = load_simulation(checkpoint_dir, context=context, accumulate="float32-reversed")
    noise = engine_figures(
        TransformersSession(model).logits, windows[:_NOISE_WINDOWS], read_source_figures(out)
    )
    for name, values in ((_NLL, noise.nll), (_KL, noise.kl), (_AGREES, noise.agrees)):
        np.save(out / name, values)
