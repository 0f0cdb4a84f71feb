"""What follows from the recipe alone: does it fit, what is its ceiling, what is known to be bad.

    plan = make_plan(PlanRequest(name="llama3.1", shape=shape, target=target, ...))
    print(render(plan))   # a table for people; plan.to_json() for programs
    refuse(plan)          # RecipeError with every fault, before anything is downloaded

Pure: nothing here reads the network, a GPU or an environment variable, or imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import Fault, RecipeError
from pipeline.plan.ceilings import REACHABLE_SHARE, WorkloadPlan, plan_workload, roofline
from pipeline.plan.findings import (
    Note,
    fit_findings,
    known_bad_findings,
    limit_faults,
    rate,
    target_findings,
)
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
from pipeline.quant.spec import keep_16bit_faults

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
        *limit_faults(request),
        *keep_16bit_faults(request.keep_16bit, request.shape),
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
    from rich.text import Text

    request = plan.request
    title = Text(
        f"{request.name}: {request.precision.title} {request.format.name} for {request.target.id} "
        f"(sm_{request.target.sm}), {' '.join(request.runtime).strip()}",
        style="bold",
    )
    parts: list[RenderableType] = [title, _sizes(plan)]
    if plan.workloads:
        ceiling = (
            "The ceiling is what the card allows at most, without speculation; up to "
            f"{REACHABLE_SHARE:.0%} of it is held to be reachable."
        )
        parts += [_workloads(plan), Text(ceiling, style="dim")]
    for note in plan.notes:
        source = f" ({note.source})" if note.source else ""
        style = "yellow" if note.severity == "warning" else ""
        parts.append(Text(f"{note.severity}: {note.path}: {note.message}{source}", style=style))
    parts += [Text(f"refused: {fault}", style="bold red") for fault in plan.faults]
    return Group(*parts)


def _sizes(plan: Plan) -> Table:
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    for row in _size_rows(plan):
        table.add_row(*row)
    return table


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
