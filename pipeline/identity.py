"""The build key: what determines a package.

It is the digest of a list of what may count; what is not on it does not. Each class says which of
its fields shape bytes (`inputs`), each stage its version, and the rest is what a manifest states: a
corrected licence is another build. Not on it: module paths, citations, power limits, where things
lie, how they are judged, and the card of a format that is bound to none. A manifest holds the list.
"""

from __future__ import annotations

from typing import Any

from pipeline.config.recipe import Recipe
from pipeline.core.values import Weights, digest_of
from pipeline.formats.spec import format_spec
from pipeline.quant.spec import quant_spec


def key_inputs(recipe: Recipe, weights: Weights) -> dict[str, Any]:
    """Everything that determines a package, as JSON values; no library is imported for it."""
    compiler, target = recipe.compiler, recipe.target
    spec = format_spec(compiler.format)
    bound = {"card": {"card": target.card, "sm": target.sm}, "sm": {"sm": target.sm}, None: {}}
    name, version = compiler.pinned_runtime
    licence = weights.licence
    return {
        "name": recipe.name,
        "recipe_version": recipe.version,
        "variant": spec.variant(quant_spec(recipe.quantizer.precision), compiler.limits, target),
        "target": bound[spec.bound_to],
        "weights": {
            "digest": weights.digest,
            "commit": weights.commit,
            "origin": weights.origin,
            "note": weights.note,
            "random": weights.random,
        },
        "licence": {
            "spdx": licence.spdx,
            "files": list(licence.files),
            "redistribution": licence.redistribution,
            "notice": licence.notice,
        },
        "quantize": dict(recipe.quantizer.inputs(weights, recipe.calibration)),
        "compile": dict(compiler.inputs(target)),
        "limits": compiler.limits.to_json(),
        "serve": list(spec.serve_args(compiler.limits)),
        "runtime": {"name": name, "version": version},
    }


def build_key(recipe: Recipe, weights: Weights) -> str:
    """SHA-256 (hex) of everything that determines a package."""
    return digest_of(key_inputs(recipe, weights))
