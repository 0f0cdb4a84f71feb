"""Which model a `config.json` describes, and the largest sizes of it that fit a card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from pipeline.build import plan_of
from pipeline.config.recipe import Recipe
from pipeline.core.errors import Fault, RecipeError
from pipeline.core.values import Format
from pipeline.formats.spec import FormatSpec, format_spec
from pipeline.model.spec import ModelSpec
from pipeline.plan.ceilings import REACHABLE_SHARE
from pipeline.quant.spec import KV_CACHE_DTYPES
from pipeline.runners.workload import Workload

START_CONTEXT, FLOOR_CONTEXT = 4096, 512
"""Contexts that are tried, in tokens: what our own recipes have, and what a short chat needs."""
_PAGED_BATCHES = (128, 64, 32, 16, 8)
_STATIC_BATCHES = (64, 32, 16, 8, 4)
_ISL, _OSL, _SMALL_BATCH = 128, 256, 4  # the workloads of our own recipes
_MAX_NUM_TOKENS = 8192  # TensorRT-LLM's default
_PREFILL_TOKENS = 4096  # of one prefill step of TensorRT-RTX; what a step holds grows with it


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """Sizes of one compiler that fit.

    Attributes:
        settings: Keys of the compiler.
        batch: Largest batch whose workload fits with them.
        context: `max_seq_len`.
    """

    settings: Mapping[str, Any]
    batch: int
    context: int


def targets(batch: int, context: int) -> tuple[Workload, ...]:
    """Workloads of a new recipe: four requests at once, and the largest batch that fits."""
    isl = min(_ISL, max(context // 3, 1))
    osl = min(_OSL, max(2 * context // 3, 1))
    return tuple(
        Workload(
            name=f"gpu-b{size}",
            batch=size,
            isl=isl,
            osl=osl,
            min_share_of_ceiling=REACHABLE_SHARE,
        )
        for size in sorted({min(_SMALL_BATCH, batch), batch})
    )


def smallest(engine_format: Format, shape: ModelSpec) -> Fitted:
    """The last sizes that `largest` tries."""
    return list(_candidates(format_spec(engine_format), shape, "bfloat16"))[-1]


def largest(recipe: Recipe) -> Fitted:
    """The largest sizes of the recipe's compiler that its plan has no fault with.

    The KV cache has the smallest type that the format holds and the known-bad table allows.

    Raises:
        RecipeError: Not even the smallest fit, or the plan refuses the model or card altogether.
    """
    faults: tuple[Fault, ...] = ()
    engine_format = format_spec(recipe.compiler.format)
    for kv_cache_dtype in _cache_dtypes(engine_format):
        for candidate in _candidates(engine_format, recipe.shape, kv_cache_dtype):
            tried = replace(
                recipe,
                compiler=replace(cast("Any", recipe.compiler), **candidate.settings),
                acceptance=replace(
                    recipe.acceptance, targets=targets(candidate.batch, candidate.context)
                ),
            )
            plan = plan_of(tried)
            if not plan.faults and plan.fit.full_length_sequences:
                return candidate
            faults = plan.faults or (Fault("target", _no_full_length(candidate)),)
            if any(fault.path == "compiler.kv_cache_dtype" for fault in faults):
                break
    batch, context = candidate.settings["max_batch_size"], candidate.context
    last = f"at batch {batch} x context {context}, the smallest that is tried"
    raise RecipeError([Fault(fault.path, f"{last}: {fault.message}") for fault in faults])


def _cache_dtypes(engine_format: FormatSpec) -> list[str]:
    """One type of the cache for each size of an element, the smallest first."""
    names = reversed(engine_format.kv_cache_dtypes)
    by_size = {KV_CACHE_DTYPES[name].bytes_per_element: name for name in names}
    return [by_size[size] for size in sorted(by_size)]


def _no_full_length(candidate: Fitted) -> str:
    return f"not one sequence of {candidate.context} tokens fits beside the weights"


def _candidates(
    engine_format: FormatSpec, shape: ModelSpec, kv_cache_dtype: str
) -> Iterator[Fitted]:
    """Sizes by halves, the largest first."""
    contexts = _contexts(shape)
    if engine_format.fit.static:
        sizes = [(batch, context) for batch in _STATIC_BATCHES for context in contexts]
        # The cache holds batch x context; of two equal products the larger batch is the faster.
        for batch, context in sorted(sizes, key=lambda size: (size[0] * size[1], size[0]))[::-1]:
            settings = {
                "max_batch_size": batch,
                "opt_batch_size": min(8, batch),
                "max_prefill_batch_size": max(1, min(8, batch, _PREFILL_TOKENS // context)),
                "max_seq_len": context,
            }
            yield Fitted(settings=settings, batch=batch, context=context)
        return
    for batch in _PAGED_BATCHES:
        for context in contexts:
            settings = {
                "max_batch_size": batch,
                "max_seq_len": context,
                "max_num_tokens": max(batch, min(_MAX_NUM_TOKENS, _ISL * batch, context * batch)),
            }
            # Half of the batch runs in the workload; the queue takes the rest.
            yield Fitted(
                settings={**settings, "kv_cache_dtype": kv_cache_dtype},
                batch=batch // 2,
                context=context,
            )


def _contexts(shape: ModelSpec) -> list[int]:
    """Contexts to try, longest first.

    Up to the sliding window every runtime attends to the same tokens, and up to LongRoPE's original
    context every one takes the same factors; so neither is passed where it is long enough.
    """
    start = min(START_CONTEXT, shape.max_position_embeddings)
    for edge in (shape.window, shape.short_rope_context):
        if edge is not None and edge >= FLOOR_CONTEXT:
            start = min(start, edge)
    halves = [start]
    step = START_CONTEXT
    while step >= FLOOR_CONTEXT:
        if step < start:
            halves.append(step)
        step //= 2
    return halves
