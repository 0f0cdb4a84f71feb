"""What a plan is asked about: one recipe, resolved as far as sizes and ceilings need it."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.core.errors import Fault
from pipeline.core.hardware import Target
from pipeline.core.values import Limits
from pipeline.formats.spec import FormatSpec
from pipeline.model.spec import ModelSpec
from pipeline.quant.spec import QuantSpec


@dataclass(frozen=True, kw_only=True)
class PlannedWorkload:
    """One workload that acceptance will measure on the target card.

    Attributes:
        name: Name in the report, such as `b64`.
        batch: Requests running at once.
        isl: Input sequence length, tokens of each prompt.
        osl: Output sequence length, tokens generated for each prompt.
        min_output_tokens_per_s: Wanted output tokens per second of the whole batch; None for a
            workload that is measured without a target.
        min_share_of_ceiling: The same as a share of this workload's ceiling, above 0 and at most 1;
            None where the target is a rate or there is none.
        mean_isl: Mean prompt length where prompts differ, tokens; None where all have `isl`.
        mean_osl: Mean output length where outputs differ, tokens; None where all have `osl`.
        path: Config path of this workload, for faults; by default `acceptance.targets[<index>]`.
    """

    name: str
    batch: int
    isl: int
    osl: int
    min_output_tokens_per_s: float | None = None
    min_share_of_ceiling: float | None = None
    mean_isl: float | None = None
    mean_osl: float | None = None
    path: str = ""


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """All that a plan depends on.

    Attributes:
        name: Recipe name.
        shape: Shape of the model.
        target: Card that the engine is for.
        format: What is built; decides how the KV cache is laid out.
        precision: Of the linears in the layers.
        keep_16bit: Patterns (fnmatch) of linears that stay 16-bit although the rest is quantized,
            such as `model.layers.*.mlp.down_proj`.
        limits: What the engine is built for.
        workloads: What acceptance will measure on the card.
        runtime: Name and version of what will run the engine, such as `("vllm", "0.24.0")`; an
            empty version where it is not known.
        judged_positions: Tokens of held-out text whose predictions acceptance keeps, of the source
            and of the checkpoint together; 0 where the whole model is not run.
        faults: What is wrong with the recipe beyond sizes, such as a workload that its runner does
            not execute.
    """

    name: str
    shape: ModelSpec
    target: Target
    format: FormatSpec
    precision: QuantSpec
    keep_16bit: tuple[str, ...] = ()
    limits: Limits
    workloads: tuple[PlannedWorkload, ...] = ()
    runtime: tuple[str, str]
    judged_positions: int = 0
    faults: tuple[Fault, ...] = ()

    def workload_path(self, index: int) -> str:
        """Config path of one workload."""
        return self.workloads[index].path or f"acceptance.targets[{index}]"
