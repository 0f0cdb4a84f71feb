"""The whole recipe as one schema: its fields are the sections of the YAML."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator
from pydantic.dataclasses import dataclass

from pipeline.acceptance.acceptance import Acceptance
from pipeline.core.errors import RecipeError
from pipeline.core.hardware import Target
from pipeline.core.kinds import OneOf
from pipeline.core.settings import STRICT
from pipeline.core.stage_protocols import EngineCompiler, Quantizer, WeightSource
from pipeline.model.read import Shape
from pipeline.registry.reference import Part, check_part
from pipeline.registry.store import Registry
from pipeline.runners.runner import Runner
from pipeline.sources.text.calibration import Calibration


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
    """One shippable artifact, resolved: what `recipes/<name>.yaml` says.

    Attributes:
        name: First part of the reference.
        version: The recipe's own version; the package's adds its build key and its digest.
        shape: The model, as far as the plan needs it.
        source: Where the weights come from.
        target: The card that the engine is for.
        calibration: The text that activation scales are measured on.
        quantizer: Makes the quantized checkpoint.
        compiler: Makes the engine.
        runner: What executes it here, for acceptance.
        acceptance: What it must show.
        registry: Where it is published.
    """

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
