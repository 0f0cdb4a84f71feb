"""The build key.

`build_key` covers every input that shapes the bytes: weights, settings, tools, the source code of
the stages, and the card's SM. Acceptance and registry are left out: they judge and place the bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.config.recipe import Recipe
from pipeline.core.values import Weights, digest_of

_JUDGING = frozenset({"acceptance", "registry", "runner"})
_HOW = frozenset({"where", "timeout_s", "memory_gib"})
"""Settings of a compiler that say how it is run, not what it makes."""


def shaping_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a resolved recipe that shapes bytes, fit for a manifest.

    The source's local path is left out: where weights lay says nothing about them, their digests
    do, and a manifest holds nobody's home folder. So is who acknowledged their licence.
    """
    kept = {name: value for name, value in config.items() if name not in _JUDGING}
    source = dict(kept.get("source", {}))
    source.pop("path", None)
    source.pop("acknowledge_licence", None)
    compiler = {
        name: value for name, value in dict(kept.get("compiler", {})).items() if name not in _HOW
    }
    return {**kept, "source": source, "compiler": compiler}


def build_key(recipe: Recipe, weights: Weights, config: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of everything that shapes the package's bytes."""
    return digest_of(
        {
            "config": shaping_config(config),
            "weights": weights.digest,
            "commit": weights.commit,
            "quantize": dict(recipe.quantizer.inputs(weights, recipe.calibration)),
            "compile": dict(recipe.compiler.inputs(recipe.target)),
            "sm": recipe.target.sm,
        }
    )
