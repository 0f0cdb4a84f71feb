"""What follows from the recipe alone: does it fit, what is its ceiling, what is known to be bad.

    plan = make_plan(PlanRequest(name="llama3.1", shape=shape, target=target, ...))
    print(render(plan))   # a table for people; plan.to_json() for programs
    refuse(plan)          # RecipeError with every fault, before anything is downloaded

A plan is pure: it reads no network, GPU or environment variable, and imports no torch. The
known-bad table is a data file of conditions, so that a lesson costs a row and no code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Literal

import pydantic.dataclasses

from pipeline.core.errors import Fault, RecipeError
from pipeline.core.settings import STRICT
from pipeline.formats.spec import format_specs
from pipeline.plan.ceilings import REACHABLE_SHARE, WorkloadPlan, plan_workload, roofline
from pipeline.plan.precisions import PrecisionPlan, compare, precision_table
from pipeline.plan.sizes import (
    BuildNeeds,
    Fit,
    PlanRequest,
    Sizes,
    build_needs,
    fit_of,
    gib,
    sizes_of,
)
from pipeline.quant.spec import quantizer_faults

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What follows from a request; with faults it must not be built."""

    request: PlanRequest
    sizes: Sizes
    fit: Fit
    workloads: tuple[WorkloadPlan, ...]
    precisions: tuple[PrecisionPlan, ...]
    build: BuildNeeds
    faults: tuple[Fault, ...]
    notes: tuple[Note, ...]

    def to_json(self) -> dict[str, Any]:
        """For programs; sizes in bytes, rates in tokens per second. Later versions only add."""
        request = self.request
        return {
            "schema": 1,
            "name": request.name,
            "format": request.format.name,
            "quantization": request.precision.name,
            "keep_16bit": list(request.keep_16bit),
            "runtime": {"name": request.runtime[0], "version": request.runtime[1]},
            "target": asdict(request.target),
            "shape": dict(request.shape.config),
            "limits": request.limits.to_json(),
            "sizes": self.sizes.to_json(),
            "fit": self.fit.to_json(),
            "reachable_share": REACHABLE_SHARE,
            "workloads": [asdict(workload) for workload in self.workloads],
            "precisions": [precision.to_json() for precision in self.precisions],
            "build": self.build.to_json(),
            "faults": [asdict(fault) for fault in self.faults],
            "notes": [asdict(note) for note in self.notes],
        }


def make_plan(request: PlanRequest) -> Plan:
    """Plan a recipe: pure, no network, no GPU. Never refuses by itself: see `refuse`."""
    sizes = sizes_of(request)
    fit = fit_of(request, sizes)
    line = roofline(request, sizes)
    workloads = tuple(plan_workload(workload, request, line, fit) for workload in request.workloads)
    found: tuple[Fault | Note, ...] = (
        *shape_faults(request),
        *limit_faults(request),
        *quantizer_faults(request.precision, request.keep_16bit, request.shape),
        *fit_findings(request, fit),
        *target_findings(request, workloads),
        *known_bad_findings(request),
        *request.faults,
    )
    return Plan(
        request=request,
        sizes=sizes,
        fit=fit,
        workloads=workloads,
        precisions=compare(request),
        build=build_needs(request, sizes),
        faults=tuple(each for each in found if isinstance(each, Fault)),
        notes=tuple(each for each in found if isinstance(each, Note)),
    )


def refuse(plan: Plan) -> None:
    """Stop a build that must not start: a `RecipeError` with all faults of the plan."""
    if plan.faults:
        raise RecipeError(plan.faults)


def render(plan: Plan) -> RenderableType:
    """Sizes and fit, one line for each workload, then notes and faults."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    request = plan.request
    title = Text(
        f"{request.name}: {request.precision.title} {request.format.name} for {request.target.id} "
        f"(sm_{request.target.sm}), {' '.join(request.runtime).strip()}",
        style="bold",
    )
    sizes = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    sizes.add_column(style="dim", no_wrap=True)
    for row in _size_rows(plan):
        sizes.add_row(*row)
    parts: list[RenderableType] = [title, sizes]
    if plan.workloads:
        ceiling = (
            "The ceiling is what the card allows at most, without speculation; up to "
            f"{REACHABLE_SHARE:.0%} of it is held to be reachable. Below: what each precision "
            "allows, and the share of it that a target needs."
        )
        parts += [_workloads(plan), Text(ceiling, style="dim")]
    parts.append(precision_table(plan.precisions, request.precision.name))
    for note in plan.notes:
        source = f" ({note.source})" if note.source else ""
        style = "yellow" if note.severity == "warning" else ""
        parts.append(Text(f"{note.severity}: {note.path}: {note.message}{source}", style=style))
    parts += [Text(f"refused: {fault}", style="bold red") for fault in plan.faults]
    return Group(*parts)


def _size_rows(plan: Plan) -> Iterator[tuple[str, str]]:
    request, sizes, fit, build = plan.request, plan.sizes, plan.fit, plan.build
    limits = request.limits
    quantized = f"{sizes.quantized_params / 1e9:.3f} B of it {request.precision.title}"
    yield "parameters", f"{sizes.params / 1e9:.3f} B, {quantized}"
    if sizes.kept_16bit:
        extra = gib(sizes.kept_16bit_extra_bytes)
        yield "kept 16-bit", f"{sizes.kept_16bit} linears, {extra} more than quantized"
    yield "checkpoint, engine", f"{gib(sizes.weight_bytes)}, {gib(sizes.engine_bytes)}"
    held = f"static, {gib(fit.static_kv_bytes)}" if fit.static_kv_bytes else "paged"
    per_token = f"{sizes.kv_bytes_per_token / 1024:g} KiB per token"
    yield "KV cache", f"{per_token}, {sizes.kv_cache.title}; {held}"
    yield (
        "memory",
        f"{gib(fit.usable_bytes)} usable of {gib(request.target.memory_bytes)}: weights "
        f"{gib(fit.engine_bytes)}, workspace about {gib(fit.workspace_bytes)}, cache "
        f"{gib(max(fit.kv_budget_bytes, 0))}",
    )
    yield (
        "limits",
        f"batch {limits.max_batch_size} x context {limits.max_seq_len}, "
        f"{limits.max_num_tokens} tokens a step",
    )
    yield (
        "largest that fits",
        f"batch {fit.full_length_sequences} at context {limits.max_seq_len}, context "
        f"{fit.max_context} at batch {limits.max_batch_size}",
    )
    if plan.workloads:
        longest = max(plan.workloads, key=lambda workload: workload.isl)
        yield (
            "prefill",
            f"at most {rate(longest.prefill_tokens_per_s)} tokens/s; a first token takes "
            f"{longest.ttft_floor_ms:.1f} ms or more (isl {longest.isl})",
        )
    compile_ram = f", compile {gib(build.compile_ram_bytes)}" if build.compile_ram_bytes else ""
    yield (
        "build needs about",
        f"disk {gib(sum(build.disk_bytes.values()))}; RAM: quantize on CPU "
        f"{gib(build.quantize_ram_bytes)} (in bfloat16 {gib(build.quantize_ram_min_bytes)})"
        f"{compile_ram}",
    )


def _workloads(plan: Plan) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0), title="tokens per second", title_justify="left")
    table.add_column("workload", overflow="fold")
    for heading in ("batch", "isl", "osl", "ceiling", "no KV", "bound", "target", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    for workload in plan.workloads:
        table.add_row(
            workload.name,
            str(workload.batch),
            str(workload.isl),
            str(workload.osl),
            rate(workload.ceiling),
            rate(workload.ceiling_without_kv),
            workload.bound,
            rate(workload.target),
            "-" if workload.share is None else f"{workload.share:.0%}",
        )
    return table


@dataclass(frozen=True, kw_only=True)
class Note:
    """Something to know that refuses nothing, and who says so; empty for the plan itself."""

    severity: Literal["warning", "note"]
    path: str
    message: str
    source: str = ""


def shape_faults(request: PlanRequest) -> Sequence[Fault]:
    """What of the model the format's converter cannot express, and which other one can."""
    shape = request.shape
    if not (faults := request.format.shape_faults(shape)):
        return ()
    others = [each for each in format_specs().values() if not each.is_checkpoint]
    able = [f"compiler={each.name}" for each in others if not each.shape_faults(shape)]
    also = "".join(f", or {one}" for one in able)
    return [Fault(fault.path, fault.message + also) for fault in faults]


def limit_faults(request: PlanRequest) -> Iterator[Fault]:
    """Limits that contradict the model, each other, or a workload."""
    limits, longest = request.limits, request.shape.max_position_embeddings
    context, batch, tokens = limits.max_seq_len, limits.max_batch_size, limits.max_num_tokens
    if context > longest:
        beyond = f"a context of {context} is beyond what the model was trained for"
        yield Fault("compiler.max_seq_len", f"{beyond}; at most {longest}")
    if tokens < batch:
        yield Fault(
            "compiler.max_num_tokens",
            f"max_num_tokens ({tokens}) must be >= max_batch_size ({batch}), for each sequence "
            "takes one in a decode step; increase compiler.max_num_tokens",
        )
    if not request.format.holds(request.precision):
        weights = f"{request.precision.title} weights"
        other = "choose another compiler or another quantizer"
        yield Fault("quantizer", f"a {request.format.name} engine cannot hold {weights}; {other}")
    for index, load in enumerate(request.workloads):
        path = f"acceptance.targets[{index}]"
        if load.isl + load.osl > context:
            total = f"isl + osl ({load.isl} + {load.osl})"
            yield Fault(f"{path}.isl", f"{total} must be <= compiler.max_seq_len ({context})")
        if load.batch > batch:
            most = f"compiler.max_batch_size ({batch})"
            yield Fault(f"{path}.batch", f"batch {load.batch} must be <= {most}")


def fit_findings(request: PlanRequest, fit: Fit) -> Iterator[Fault | Note]:
    """What the card's memory does not hold, and limits that promise more than it does."""
    limits, card = request.limits, request.target.id
    left = f"the {gib(fit.kv_budget_bytes)} that {card} has left beside weights and workspace"
    if fit.kv_budget_bytes < fit.kv_bytes_per_token:
        missing = fit.kv_bytes_per_token - fit.kv_budget_bytes
        yield Fault(
            "target",
            f"the model does not fit {card}, by {gib(missing)}: weights {gib(fit.engine_bytes)} "
            f"and workspace {gib(fit.workspace_bytes)} leave no room for a KV cache in the "
            f"{gib(fit.usable_bytes)} that can be used; choose a card with more memory, or a "
            "smaller model, compiler.max_num_tokens or compiler.max_batch_size",
        )
    elif fit.static_kv_bytes > fit.kv_budget_bytes:
        yield Fault(
            "compiler.max_batch_size",
            f"the static cache of batch {limits.max_batch_size} x context {limits.max_seq_len} "
            f"takes {gib(fit.static_kv_bytes)}, {gib(fit.static_kv_bytes - fit.kv_budget_bytes)} "
            f"more than {left}; at most batch {fit.full_length_sequences} at context "
            f"{limits.max_seq_len}, or context {fit.max_context} at batch {limits.max_batch_size}",
        )
    elif not fit.static_kv_bytes:
        for index, workload in enumerate(request.workloads):
            context = workload.isl + workload.osl
            if not fit.holds(workload.batch, context):
                largest = fit.kv_budget_bytes // fit.sequence_bytes(context)
                needed = workload.batch * fit.sequence_bytes(context)
                yield Fault(
                    f"acceptance.targets[{index}].batch",
                    f"the cache of batch {workload.batch} x (isl + osl) {context} takes "
                    f"{gib(needed)}, {gib(needed - fit.kv_budget_bytes)} more than {left} "
                    f"({request.format.fit.usable_share:.0%} of its memory counted); at most batch "
                    f"{largest}",
                )
        if fit.full_length_sequences == 0:
            longest = fit.kv_budget_bytes // fit.kv_bytes_per_token
            yield Note(
                severity="warning",
                path="compiler.max_seq_len",
                message=f"not one sequence of {limits.max_seq_len} tokens fits, and some runtimes "
                f"do not start then; up to {longest} do",
            )


def target_findings(
    request: PlanRequest, workloads: tuple[WorkloadPlan, ...]
) -> Iterator[Fault | Note]:
    """Targets above the ceiling, which are refused, and targets that are hard to reach."""
    for index, workload in enumerate(workloads):
        if workload.share is None or workload.share <= REACHABLE_SHARE:
            continue
        as_share = request.workloads[index].min_share_of_ceiling is not None
        key = "min_share_of_ceiling" if as_share else "min_output_tokens_per_s"
        path = f"acceptance.targets[{index}].{key}"
        if workload.share > 1:
            yield Fault(path, _impossible(workload))
        else:
            message = (
                f"{rate(workload.target)} tok/s at batch {workload.batch} is {workload.share:.0%} "
                f"of this card's ceiling of {rate(workload.ceiling)}; up to {REACHABLE_SHARE:.0%} "
                f"is held to be reachable{_advice(workload)}"
            )
            yield Note(severity="warning", path=path, message=message)


def _impossible(workload: WorkloadPlan) -> str:
    wanted, ceiling = rate(workload.target), rate(workload.ceiling)
    if wanted == ceiling:
        wanted, ceiling = f"{workload.target:.2f}", f"{workload.ceiling:.2f}"
    without_kv = rate(workload.ceiling_without_kv)
    aside = f" ({without_kv} without its KV cache)" if without_kv != ceiling else ""
    above = f"above this card's ceiling of {ceiling}{aside}"
    return f"{wanted} tok/s at batch {workload.batch} is {above}{_advice(workload)}"


def _advice(workload: WorkloadPlan) -> str:
    if workload.reachable_batch is None:
        return "; no batch that fits this card makes it reachable"
    return f"; at batch >= {workload.reachable_batch} it is reachable"


def rate(tokens_per_s: float | None) -> str:
    """Tokens per second for people: whole numbers."""
    return "-" if tokens_per_s is None else f"{tokens_per_s:.0f}"


CONDITIONS: Mapping[str, type] = {
    "architecture": list,
    "format": list,
    "precision": list,
    "kv_cache_dtype": list,
    "sm": list,  # compute capability x 10 of the card
    "sm_below": int,
    "beyond_sliding_window": bool,  # max_seq_len exceeds the model's sliding window
    "beyond_original_context": bool,  # ... the context up to which LongRoPE's short factors hold
}
"""What a row's `when` may state: any of a list, less than a number, or that something is so."""


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class KnownBad:
    """One row of the table; its fields are explained at the top of the data file."""

    id: str
    when: dict[str, Any]
    severity: Literal["error", "warning", "note"]
    path: str
    message: str
    source: str

    def __post_init__(self) -> None:
        for name, value in self.when.items():
            if name not in CONDITIONS or type(value) is not CONDITIONS[name]:
                raise ValueError(f"{name}: {value!r} is no condition of this table")

    def holds(self, given: Mapping[str, Any]) -> bool:
        """Whether every condition holds; one on what is not given does not."""
        return all(
            name in given and _holds(name, value, given[name]) for name, value in self.when.items()
        )


def _holds(name: str, value: Any, found: Any) -> bool:
    if isinstance(value, list):
        return found in value
    return bool(found < value if name == "sm_below" else found is value)


def conditions_of(request: PlanRequest) -> dict[str, Any]:
    """What the conditions of a row are held against."""
    shape, context = request.shape, request.limits.max_seq_len
    return {
        "architecture": shape.architecture,
        "format": request.format.name,
        "precision": request.precision.name,
        "kv_cache_dtype": request.limits.kv_cache_dtype,
        "sm": request.target.sm,
        "sm_below": request.target.sm,
        "beyond_sliding_window": context > (shape.window_of_all or context),
        "beyond_original_context": context > (shape.short_rope_context or context),
    }


@cache
def known_bad_table() -> tuple[KnownBad, ...]:
    """The table that travels with the package."""
    import yaml  # 8 ms, and only plans need it

    rows = yaml.safe_load(files("pipeline.plan").joinpath("known_bad.yaml").read_text("utf-8"))
    return tuple(KnownBad(**row) for row in rows)


def known_bad_findings(request: PlanRequest) -> Iterator[Fault | Note]:
    """Rows of the known-bad table that hold; those of severity `error` are faults."""
    given = conditions_of(request)
    for row in known_bad_table():
        if not row.holds(given):
            continue
        if row.severity == "error":
            yield Fault(row.path, f"{row.message} ({row.source})")
        else:
            yield Note(severity=row.severity, path=row.path, message=row.message, source=row.source)


def checkpoint_faults(*, architecture: str, kv_cache_dtype: str) -> list[Fault]:
    """Errors of the table that hold for a checkpoint whatever the card and the runtime."""
    given = {"architecture": architecture, "kv_cache_dtype": kv_cache_dtype}
    return [
        Fault("--kv-cache-dtype", f"{row.message} ({row.source})")
        for row in known_bad_table()
        if row.severity == "error" and row.holds(given)
    ]
