"""What an engine is compared with: the source weights in vLLM and in Transformers.

In vLLM all get the artifact's server limits and the same number of cached tokens. Two processes
share one card. vLLM measures the card's free memory while it loads and takes what another process
frees or takes meanwhile for its own; `--kv-cache-memory-bytes` sets the cache and skips that
measurement (`Worker.determine_available_memory`, v1/worker/gpu_worker.py, 0.24.0). What is left is
a check that `--gpu-memory-utilization` of the card is free (`request_memory`, v1/worker/utils.py),
so that share is small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path

from pipeline.acceptance.pairs import Peer
from pipeline.core.values import Engine
from pipeline.model.spec import ModelSpec
from pipeline.quant.spec import KV_CACHE_DTYPES
from pipeline.runners.child import Timeouts
from pipeline.runners.session import Session
from pipeline.runners.vllm import VllmRunner
from pipeline.runners.workload import Workload

TRANSFORMERS = "transformers"
VLLM_PEERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "vllm-bf16": ("vLLM, bfloat16", ()),
    "vllm-fp8": ("vLLM, its online FP8", ("--quantization", "fp8")),
}
"""Name -> label, and how it differs from plain bfloat16."""
CARD_PEERS = (*VLLM_PEERS, TRANSFORMERS)

_MEMORY_SHARE = 0.05
_BLOCK_TOKENS = 16
"""vLLM's cache comes in blocks of so many tokens (`CacheConfig.DEFAULT_BLOCK_SIZE`, 0.24.0)."""
_SLACK = 1.1
_KV_DTYPE = "--kv-cache-dtype"
_SLOW_ROUNDS = 3
"""A round of Phi-3-mini's shape in Transformers at batches 1 to 128 takes over a minute (71 s by
the rates of an H200, 2026-11-24); of a ratio that large the second digit does not matter."""


def engine_in_vllm(
    runner: VllmRunner, engine: Engine, shape: ModelSpec, workloads: Sequence[Workload]
) -> AbstractContextManager[Session]:
    """The artifact as its own manifest says how to serve it, with room for a peer beside it."""
    element_bytes = KV_CACHE_DTYPES[engine.limits.kv_cache_dtype].bytes_per_element
    cache = cache_bytes(shape, workloads, engine, element_bytes)
    return _sharing(runner, cache).open_folder(engine.dir, engine.serve_args)


def card_peers(
    names: Sequence[str],
    runner: VllmRunner,
    weights_dir: Path,
    engine: Engine,
    shape: ModelSpec,
    workloads: Sequence[Workload],
) -> tuple[Peer, ...]:
    """The peers of those names, on a card.

    Args:
        names: Of `CARD_PEERS`.
        runner: Whose arguments and timeouts are used.
        weights_dir: The source model.
        engine: The artifact, whose limits all get.
        shape: The model.
        workloads: What its cache must hold.
    """
    sharing = _sharing(runner, cache_bytes(shape, workloads, engine, 2))
    timeouts = Timeouts(load_s=runner.load_timeout_s, answer_s=runner.answer_timeout_s)
    made = []
    for name in names:
        if name == TRANSFORMERS:
            from pipeline.runners.transformers import open_in_child

            opener: Callable[[], AbstractContextManager[Session]]
            weights = {"weights_dir": str(weights_dir), "dtype": "bfloat16", "device": "cuda"}
            opener = partial(open_in_child, "open_source", timeouts, **weights)
            label = "Hugging Face generate, bfloat16"
            made.append(Peer(name=name, label=label, open=opener, max_rounds=_SLOW_ROUNDS))
            continue
        label, difference = VLLM_PEERS[name]
        serve = ("--dtype", "bfloat16", *shared_arguments(engine.serve_args), *difference)
        opener = partial(sharing.open_folder, weights_dir, serve)
        made.append(Peer(name=name, label=label, open=opener))
    return tuple(made)


def cpu_peer(weights_dir: Path) -> Peer:
    """The source in float32 on this machine's CPU."""
    from pipeline.runners.transformers import open_source

    label = "Hugging Face generate, float32"
    return Peer(name=TRANSFORMERS, label=label, open=partial(open_source, weights_dir))


def shared_arguments(serve_args: Sequence[str]) -> tuple[str, ...]:
    """The artifact's serve arguments less its KV cache's dtype: the limits that all get."""
    kept = list(serve_args)
    if _KV_DTYPE in kept:
        at = kept.index(_KV_DTYPE)
        del kept[at : at + 2]
    return tuple(kept)


def cache_bytes(
    shape: ModelSpec, workloads: Sequence[Workload], engine: Engine, element_bytes: int
) -> int:
    """KV cache for the largest workload, in whole blocks, with a tenth to spare.

    vLLM also demands room for one request of full length.

    Args:
        shape: The model.
        workloads: batch x (isl + osl) tokens each.
        engine: Its `max_seq_len` is the full length.
        element_bytes: 1 for an FP8 cache, else 2.
    """

    def blocks(tokens: int) -> int:
        return -(-tokens // _BLOCK_TOKENS)

    held = max(load.batch * blocks(load.isl + load.osl) for load in workloads)
    wanted = int(_SLACK * max(held, blocks(engine.limits.max_seq_len))) + 1
    return shape.kv_bytes(wanted * _BLOCK_TOKENS, element_bytes)


def _sharing(runner: VllmRunner, cache: int) -> VllmRunner:
    return replace(
        runner,
        gpu_memory_utilization=_MEMORY_SHARE,
        arguments=(*runner.arguments, "--kv-cache-memory-bytes", str(cache)),
    )
