"""Ours and its peers in vLLM: the same server limits and the same number of cached tokens for all.

Two processes share one card. vLLM measures the card's free memory while it loads and takes what
another process frees or takes meanwhile for its own; `--kv-cache-memory-bytes` sets the cache and
skips that measurement (`Worker.determine_available_memory`, v1/worker/gpu_worker.py, 0.24.0). What
is left is a check that `--gpu-memory-utilization` of the card is free (`request_memory`,
v1/worker/utils.py), so that share is small.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from pipeline.acceptance.race.contenders import OURS, Pace
from pipeline.core.values import Engine
from pipeline.model.spec import ModelSpec
from pipeline.runners.session import Session
from pipeline.runners.vllm.session import Timeouts, engine_arguments, open_session
from pipeline.runners.workload import Workload

MEMORY_SHARE = "0.05"
"""Not the memory that vLLM takes, only what its first check demands: see above."""
OVERHEAD_BYTES = 6 << 30
"""Beside weights and cache: CUDA context, kernels, CUDA graphs, activations of one full prefill.
An estimate to refuse what cannot fit, not a measurement."""
_BLOCK_TOKENS = 16
"""vLLM's cache comes in blocks of so many tokens (`CacheConfig.DEFAULT_BLOCK_SIZE`, 0.24.0)."""
_SLACK = 1.1
_KV_DTYPE = "--kv-cache-dtype"


@dataclass(frozen=True, kw_only=True)
class VllmContender:
    """A folder in vLLM; see `pipeline.acceptance.race.contenders.Contender`.

    Attributes:
        name: Short name.
        label: What it is, for people.
        arguments: All arguments of vLLM's engine.
        memory_bytes: Device memory, estimated.
        timeouts: How long to wait for it.
    """

    name: str
    label: str
    arguments: tuple[str, ...]
    memory_bytes: int
    timeouts: Timeouts

    @property
    def pace(self) -> Pace:
        return Pace()

    def open(self, log_path: Path) -> AbstractContextManager[Session]:
        return open_session(self.arguments, self.timeouts, log_path)


@dataclass(frozen=True, kw_only=True)
class _Difference:
    """How a peer differs from plain bfloat16."""

    label: str
    arguments: tuple[str, ...]
    kv_element_bytes: int


_PEERS = {
    "vllm-bf16": _Difference(label="vLLM, bfloat16", arguments=(), kv_element_bytes=2),
    "vllm-fp8": _Difference(
        label="vLLM, its online FP8", arguments=("--quantization", "fp8"), kv_element_bytes=2
    ),
    "vllm-fp8-kv8": _Difference(
        label="vLLM, its online FP8 with an FP8 KV cache",
        arguments=("--quantization", "fp8", _KV_DTYPE, "fp8"),
        kv_element_bytes=1,
    ),
}
VLLM_PEERS = tuple(_PEERS)


def ours_in_vllm(
    engine: Engine, shape: ModelSpec, workloads: Sequence[Workload], timeouts: Timeouts
) -> VllmContender:
    """Our artifact, as its own manifest says how to serve it."""
    element_bytes = 1 if engine.limits.kv_cache_dtype == "fp8" else 2
    cache = cache_bytes(shape, workloads, engine, element_bytes)
    kind = "an FP8" if element_bytes == 1 else "a 16-bit"
    return VllmContender(
        name=OURS,
        label=f"our FP8 artifact in vLLM, {kind} KV cache",
        arguments=_arguments(engine.dir, engine.serve_args, cache),
        memory_bytes=weight_bytes(engine.dir) + cache + OVERHEAD_BYTES,
        timeouts=timeouts,
    )


def vllm_peer(
    name: str,
    weights_dir: Path,
    engine: Engine,
    shape: ModelSpec,
    workloads: Sequence[Workload],
    timeouts: Timeouts,
) -> VllmContender:
    """The source weights in vLLM, under the limits of our artifact.

    Args:
        name: One of `VLLM_PEERS`.
        weights_dir: The source model.
        engine: Our artifact.
        shape: The model.
        workloads: What its cache must hold.
        timeouts: How long to wait for it.
    """
    recipe = _PEERS[name]
    cache = cache_bytes(shape, workloads, engine, recipe.kv_element_bytes)
    serve = ("--dtype", "bfloat16", *shared_arguments(engine.serve_args), *recipe.arguments)
    return VllmContender(
        name=name,
        label=recipe.label,
        arguments=_arguments(weights_dir, serve, cache),
        memory_bytes=weight_bytes(weights_dir) + cache + OVERHEAD_BYTES,
        timeouts=timeouts,
    )


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


def weight_bytes(folder: Path) -> int:
    """Safetensors of a folder. Online FP8 reads them all before it makes them smaller."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _arguments(folder: Path, serve_args: Sequence[str], cache: int) -> tuple[str, ...]:
    more = ("--gpu-memory-utilization", MEMORY_SHARE, "--kv-cache-memory-bytes", str(cache))
    return engine_arguments(folder, serve_args, more)
