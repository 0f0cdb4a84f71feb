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
from pipeline.core.kinds import OneOf
from pipeline.core.settings import STRICT
from pipeline.core.values import Checkpoint, Licence, Weights
from pipeline.formats.spec import EngineCompiler
from pipeline.model.read import Shape
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
