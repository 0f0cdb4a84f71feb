"""The whole recipe as one schema: its fields are the sections of the YAML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Protocol, runtime_checkable

from pydantic import AfterValidator
from pydantic.dataclasses import dataclass

from pipeline.acceptance.acceptance import Acceptance
from pipeline.core.cache import StageCache
from pipeline.core.errors import RecipeError
from pipeline.core.hardware import Target
from pipeline.core.published import digest_of
from pipeline.core.settings import STRICT, OneOf
from pipeline.core.values import Checkpoint, Licence, Weights
from pipeline.formats.spec import EngineCompiler, format_spec
from pipeline.model.read import Shape
from pipeline.quant.spec import quant_spec
from pipeline.registry.reference import Part, check_part
from pipeline.registry.stores import Registry
from pipeline.runners.runner import Runner
from pipeline.sources.text.corpus import Calibration


@runtime_checkable
class WeightSource(Protocol):
    """Brings a Hugging Face folder into the weight cache."""

    @property
    def terms(self) -> Licence:
        """Known before anything is fetched."""
        ...

    def fetch(self) -> Weights:
        """Download or convert, unless the cache holds it; verified, atomic."""
        ...


@runtime_checkable
class Quantizer(Protocol):
    """Turns weights into the unified checkpoint."""

    @property
    def precision(self) -> str:
        """What it quantizes to: a name that `pipeline.quant.spec` knows."""
        ...

    @property
    def keep_16bit(self) -> tuple[str, ...]:
        """Patterns (fnmatch) of linears that stay 16-bit."""
        ...

    def inputs(self, weights: Weights, calibration: Calibration) -> Mapping[str, Any]:
        """Everything that shapes the checkpoint's bytes, as JSON values."""
        ...

    def quantize(self, weights: Weights, calibration: Calibration, cache: StageCache) -> Checkpoint:
        """Make the checkpoint, or take it from the cache."""
        ...


def _part(part: Part) -> AfterValidator:
    """Hold a text against the grammar of references, here and not after an hour's compile."""

    def check(text: str) -> str:
        try:
            return check_part(part, text)
        except RecipeError as error:
            raise ValueError(str(error)) from None

    return AfterValidator(check)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Recipe:
    """What `recipes/<name>.yaml` says, resolved; `version` is the recipe's own."""

    name: Annotated[str, _part("name")]
    version: Annotated[str, _part("recipe_version")]
    shape: Shape
    source: Annotated[WeightSource, OneOf("pipeline.sources")]
    target: Target
    calibration: Calibration
    quantizer: Annotated[Quantizer, OneOf("pipeline.quant")]
    compiler: Annotated[EngineCompiler, OneOf("pipeline.formats", "compiler")]
    runner: Annotated[Runner, OneOf("pipeline.runners")]
    acceptance: Acceptance
    registry: Annotated[Registry, OneOf("pipeline.registry.stores", "registry")]


_WEIGHTS = ("digest", "commit", "origin", "note", "random")


def key_inputs(recipe: Recipe, weights: Weights) -> dict[str, Any]:
    """Everything that determines a package, as JSON values; no library is imported for it.

    A list of what may count. Each class says which of its fields shape bytes (`inputs`), each stage
    its version, and the rest is what a manifest states: a corrected licence is another build. Not
    on it: module paths, citations, power limits, where things lie, how they are judged, and the
    card of a format that is bound to none. A manifest holds the list.
    """
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
        "weights": {key: getattr(weights, key) for key in _WEIGHTS},
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
