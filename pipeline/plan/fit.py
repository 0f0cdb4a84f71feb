"""Does it fit the card's memory: weights, workspace and KV cache, by the rules of each format.

A paged runtime takes cache as sequences grow, so it must hold what the workloads hold at their
end; more requests wait in its queue. A static cache is allocated whole: its largest batch at full
context must fit, past and present in one buffer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.core.hardware import GIB
from pipeline.core.values import Limits
from pipeline.plan.request import PlanRequest
from pipeline.plan.sizes import Sizes

_CONTEXT_BYTES = GIB // 2
"""CUDA context and kernels of one process; an estimate: 0.3 GB for PyTorch with lazy loading
(PyTorch issue 107667), 0.1 to 0.55 GiB bare, growing with the card (llama.cpp PR 23604)."""


def workspace_bytes(request: PlanRequest) -> int:
    """Device memory for everything but weights and cache; an estimate, never measured.

    - CUDA context.
    - Logits of one step in float32, and their softmax: 2 x batch x vocabulary x 4 B.
    - Activations at the widest point of a layer, 16-bit, for all tokens of one step: the residual
      and its normed copy, beside gate, up and their product, or q, k, v and the attention output.
    - The attention mask of one step, where the format has one.
    """
    shape, limits = request.shape, request.limits
    widest = max(layer.widest_features for layer in shape.layers)
    total = _CONTEXT_BYTES + 2 * 4 * limits.max_batch_size * shape.vocab_size
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
        static_kv_bytes: Cache of the largest batch at full context, where it is allocated whole;
            else 0.
        full_length_sequences: How many sequences of `max_seq_len` the cache holds: the largest
            batch at this context.
        max_context: Longest context at `max_batch_size`, at most what the model was trained for.
    """

    usable_bytes: int
    engine_bytes: int
    workspace_bytes: int
    kv_bytes_per_token: int
    static_kv_bytes: int
    full_length_sequences: int
    max_context: int

    @property
    def kv_budget_bytes(self) -> int:
        """What weights and workspace leave; negative if they do not fit themselves."""
        return self.usable_bytes - self.engine_bytes - self.workspace_bytes

    def holds(self, batch: int, context: int) -> bool:
        """Whether the cache of `batch` sequences of `context` tokens fits."""
        return batch * context * self.kv_bytes_per_token <= self.kv_budget_bytes

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "kv_budget_bytes": self.kv_budget_bytes}


def fit_of(request: PlanRequest, sizes: Sizes) -> Fit:
    """What fits the request's card."""
    limits = request.limits
    rule = request.format.fit
    usable = int(request.target.memory_bytes * rule.usable_share)
    workspace = workspace_bytes(request)
    tokens = max(usable - sizes.engine_bytes - workspace, 0) // sizes.kv_bytes_per_token
    return Fit(
        usable_bytes=usable,
        engine_bytes=sizes.engine_bytes,
        workspace_bytes=workspace,
        kv_bytes_per_token=sizes.kv_bytes_per_token,
        static_kv_bytes=_full_batch_tokens(limits) * sizes.kv_bytes_per_token if rule.static else 0,
        full_length_sequences=tokens // max(limits.max_seq_len, 1),
        max_context=min(
            tokens // max(limits.max_batch_size, 1), request.shape.max_position_embeddings
        ),
    )


def _full_batch_tokens(limits: Limits) -> int:
    return limits.max_batch_size * limits.max_seq_len
