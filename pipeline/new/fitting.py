"""The largest sizes of a model that fit a card."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

from pipeline.build import plan_of
from pipeline.config.recipe import Recipe
from pipeline.core.errors import Fault, RecipeError
from pipeline.formats.spec import FormatSpec, format_spec
from pipeline.model.spec import ModelSpec
from pipeline.plan.ceilings import REACHABLE_SHARE
from pipeline.quant.spec import KV_CACHE_DTYPES
from pipeline.runners.workload import Workload

START_CONTEXT, FLOOR_CONTEXT = 4096, 512
"""Contexts that are tried, in tokens: what our own recipes have, and what a short chat needs."""
_HALVES = 5  # of them: the smallest batch that is tried is 4, or 8
_ISL, _OSL, _SMALL_BATCH = 128, 256, 4  # the workloads of our own recipes
_MAX_NUM_TOKENS = 8192  # TensorRT-LLM's default
_PREFILL_TOKENS = 4096  # of one prefill step of TensorRT-RTX; what a step holds grows with it


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """Settings of one compiler that fit, and the largest batch whose workload fits with them."""

    settings: Mapping[str, Any]
    batch: int
    context: int


def targets(batch: int, context: int) -> tuple[Workload, ...]:
    """Workloads of a new recipe: four requests at once, and the largest batch that fits."""
    isl = min(_ISL, max(context // 3, 1))
    osl = min(_OSL, max(2 * context // 3, 1))
    share = REACHABLE_SHARE
    return tuple(
        Workload(name=f"gpu-b{size}", batch=size, isl=isl, osl=osl, min_share_of_ceiling=share)
        for size in sorted({min(_SMALL_BATCH, batch), batch})
    )


def most_batch(spec: FormatSpec) -> int:
    """The largest batch that is tried."""
    return 64 if spec.fit.static else 128


def smallest(engine_format: str, shape: ModelSpec) -> Fitted:
    """The last sizes that `largest` tries."""
    spec = format_spec(engine_format)
    batch, context = _tried(spec, shape)[-1]
    return _fitted(spec, batch, context, "bfloat16")


def largest(recipe: Recipe) -> Fitted:
    """The largest sizes of the recipe's compiler that its plan has no fault with.

    Contexts and batches go down by halves until the plan accepts; then the batch grows. The KV
    cache has the smallest type that the format holds and the known-bad table allows.

    Raises:
        RecipeError: Not even the smallest fit, or the plan refuses the model or card altogether.
    """
    spec = format_spec(recipe.compiler.format)
    for kv_cache_dtype in _cache_dtypes(spec):
        for batch, context in _tried(spec, recipe.shape):
            size = partial(_fitted, spec, context=context, kv_cache_dtype=kv_cache_dtype)
            faults = _faults(recipe, size(batch))
            if not faults:
                larger = range(batch + 1, min(2 * batch, most_batch(spec) + 1))
                refused = partial(_refused, recipe, size)
                return size(batch + bisect.bisect(larger, False, key=refused))
            if any(fault.path == "compiler.kv_cache_dtype" for fault in faults):
                break
    last = f"at batch {batch} x context {context}, the smallest that is tried"
    raise RecipeError([Fault(fault.path, f"{last}: {fault.message}") for fault in faults])


def _refused(recipe: Recipe, size: Callable[[int], Fitted], batch: int) -> bool:
    return bool(_faults(recipe, size(batch)))


def _faults(recipe: Recipe, fitted: Fitted) -> tuple[Fault, ...]:
    plan = plan_of(
        replace(
            recipe,
            compiler=replace(cast("Any", recipe.compiler), **fitted.settings),
            acceptance=replace(recipe.acceptance, targets=targets(fitted.batch, fitted.context)),
        )
    )
    if plan.faults or plan.fit.full_length_sequences:
        return plan.faults
    message = f"not one sequence of {fitted.context} tokens fits beside the weights"
    return (Fault("target", message),)


def _cache_dtypes(engine_format: FormatSpec) -> list[str]:
    """One type of the cache for each size of an element, the smallest first."""
    names = reversed(engine_format.kv_cache_dtypes)
    by_size = {KV_CACHE_DTYPES[name].bytes_per_element: name for name in names}
    return [by_size[size] for size in sorted(by_size)]


def _tried(spec: FormatSpec, shape: ModelSpec) -> list[tuple[int, int]]:
    """Batches and contexts by halves, the largest first."""
    contexts = _contexts(shape)
    sizes = [(most_batch(spec) >> half, context) for half in range(_HALVES) for context in contexts]
    if not spec.fit.static:
        return sizes
    # The cache holds batch x context; of two equal products the larger batch is the faster.
    return sorted(sizes, key=lambda size: (size[0] * size[1], size[0]), reverse=True)


def _fitted(spec: FormatSpec, batch: int, context: int, kv_cache_dtype: str) -> Fitted:
    """The compiler's settings for one size."""
    settings = {"max_batch_size": batch, "max_seq_len": context}
    if spec.fit.static:
        settings |= {
            "opt_batch_size": min(8, batch),
            "max_prefill_batch_size": max(1, min(8, batch, _PREFILL_TOKENS // context)),
        }
        return Fitted(settings=settings, batch=batch, context=context)
    tokens = max(batch, min(_MAX_NUM_TOKENS, _ISL * batch, context * batch))
    # Half of the batch runs in the workload; the queue takes the rest.
    return Fitted(
        settings={**settings, "max_num_tokens": tokens, "kv_cache_dtype": kv_cache_dtype},
        batch=batch // 2,
        context=context,
    )


def _contexts(shape: ModelSpec) -> list[int]:
    """Contexts to try, longest first, up to the sliding window and LongRoPE's original context.

    Up to them every runtime attends to the same tokens with the same factors.
    """
    start = min(START_CONTEXT, shape.max_position_embeddings)
    for edge in (shape.window, shape.short_rope_context):
        if edge is not None and edge >= FLOOR_CONTEXT:
            start = min(start, edge)
    halves = [START_CONTEXT >> half for half in range(START_CONTEXT // FLOOR_CONTEXT)]
    return [start, *(step for step in halves if FLOOR_CONTEXT <= step < start)]
