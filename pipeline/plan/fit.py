"""Does it fit the card's memory: weights, workspace and KV cache, by the rules of each format.

A paged runtime takes cache as sequences grow, so it must hold what the workloads hold at their
end; more requests wait in its queue. A static cache is allocated whole: its largest batch at full
context must fit, past and present in one buffer.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from pipeline.core.hardware import GIB
from pipeline.core.values import Limits
from pipeline.plan.request import PlanRequest
from pipeline.plan.sizes import Sizes

_CONTEXT_BYTES = GIB // 2
"""CUDA context and kernels of one process; an estimate: 0.3 GB for PyTorch with lazy loading
(PyTorch issue 107667), 0.1 to 0.55 GiB bare, growing with the card (llama.cpp PR 23604)."""


def workspace_bytes(request: PlanRequest, limits: Limits) -> int:
    """Device memory for everything but weights and cache; an estimate, never measured.

    - CUDA context.
    - Logits of one step in float32, and their softmax: 2 x batch x vocabulary x 4 B.
    - Activations at the widest point of a layer, 16-bit, for all tokens of one step.
    - The attention mask of one step, where the format has one.
    """
    widest = max(layer.widest_features for layer in request.shape.layers)
    total = _CONTEXT_BYTES + 2 * 4 * limits.max_batch_size * request.shape.vocab_size
    total += 2 * limits.max_num_tokens * widest
    return total + request.format.fit.mask_bytes * limits.max_num_tokens * limits.max_seq_len


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Device memory, and what is left of it for the KV cache.

    Attributes:
        usable_bytes: What the runtime may use of the card.
        engine_bytes: Weights as loaded.
        workspace_bytes: See `workspace_bytes`.
        kv_bytes_per_token: Cache of one token.
        state_bytes: What a sequence holds beside its cache, whatever its length.
        static_kv_bytes: Cache of the largest batch at full context, where it is allocated whole;
            else 0.
        full_length_sequences: Largest batch at `max_seq_len` that fits, with its own workspace; at
            most `max_num_tokens`, of which a decode step takes one for each sequence.
        max_context: Longest context at `max_batch_size`, at most what the model was trained for.
    """

    usable_bytes: int
    engine_bytes: int
    workspace_bytes: int
    kv_bytes_per_token: int
    state_bytes: int
    static_kv_bytes: int
    full_length_sequences: int
    max_context: int

    @property
    def kv_budget_bytes(self) -> int:
        """What weights and workspace leave; negative if they do not fit themselves."""
        return self.usable_bytes - self.engine_bytes - self.workspace_bytes

    def holds(self, batch: int, context: int) -> bool:
        """Whether the cache of `batch` sequences of `context` tokens fits."""
        return batch * self.sequence_bytes(context) <= self.kv_budget_bytes

    def sequence_bytes(self, context: int) -> int:
        """What one sequence of `context` tokens holds."""
        return context * self.kv_bytes_per_token + self.state_bytes

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "kv_budget_bytes": self.kv_budget_bytes}


def fit_of(request: PlanRequest, sizes: Sizes) -> Fit:
    """What fits the request's card."""
    limits, shape, rule = request.limits, request.shape, request.format.fit
    usable = int(request.target.memory_bytes * rule.usable_share)

    def sequence_bytes(context: int) -> int:
        return context * sizes.kv_bytes_per_token + shape.state_bytes

    def fits(batch: int, context: int) -> bool:
        tried = replace(limits, max_batch_size=batch, max_seq_len=context)
        if rule.static:  # its prefill takes whole prompts
            tokens = limits.max_num_tokens * context // max(limits.max_seq_len, 1)
            tried = replace(tried, max_num_tokens=tokens)
        elif batch < limits.max_batch_size:  # its workspace is that of the limits
            tried = replace(tried, max_batch_size=limits.max_batch_size)
        held = sizes.engine_bytes + workspace_bytes(request, tried)
        return held + batch * sequence_bytes(context) <= usable

    full_batch = limits.max_batch_size * sequence_bytes(limits.max_seq_len)
    return Fit(
        usable_bytes=usable,
        engine_bytes=sizes.engine_bytes,
        workspace_bytes=workspace_bytes(request, limits),
        kv_bytes_per_token=sizes.kv_bytes_per_token,
        state_bytes=shape.state_bytes,
        static_kv_bytes=full_batch if rule.static else 0,
        full_length_sequences=_largest(
            limits.max_num_tokens, lambda batch: fits(batch, limits.max_seq_len)
        ),
        max_context=_largest(
            shape.max_position_embeddings, lambda context: fits(limits.max_batch_size, context)
        ),
    )


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest size from 1 to `most` that fits, if all smaller ones do; 0 if none does."""
    return bisect.bisect(range(1, most + 1), False, key=lambda size: not fits(size))
