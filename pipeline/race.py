"""A race: acceptance's measuring with peers beside the engine, on a card or on this CPU.

The same clock, judge, report and page as acceptance. It measures speed only, so its verdict is
`measured` at best, which enters no channel.

What drifts (clocks, heat, the host's other work) hits both runs of a round alike, so the ratio is
taken within each round, and the median over rounds is the result. Its interval is the percentile
bootstrap of that median (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).

Peers are the source weights in vLLM and in Transformers. Two processes share one card, so
`--kv-cache-memory-bytes` sets vLLM's cache, which else takes what another process frees meanwhile
(`determine_available_memory`, v1/worker/gpu_worker.py, 0.24.0), and `--gpu-memory-utilization`,
then only checked to be free (`request_memory`, v1/worker/utils.py), is small.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from pipeline.acceptance.card import HeldCard, held_card
from pipeline.acceptance.judge import judge, judge_physics
from pipeline.acceptance.measure import conditions_json
from pipeline.acceptance.report import REPORT_FILE, write_report
from pipeline.acceptance.speed import ENGINE, SpeedSample, measure_speed, spread_findings, summarize
from pipeline.answer import Answer
from pipeline.build import plan_of
from pipeline.config.compose import config_folders
from pipeline.config.load import load
from pipeline.config.recipe import Recipe
from pipeline.core.cache import StageCache, require_files
from pipeline.core.errors import (
    ConflictError,
    ExitCode,
    Fault,
    IncompatibleError,
    PipelineError,
    RecipeError,
)
from pipeline.core.ownership import make_own
from pipeline.core.published import digest_of
from pipeline.core.settings import cache_root, shipped
from pipeline.core.values import Engine, Report, Verdict, Weights
from pipeline.machine import require_builder, require_room
from pipeline.model.spec import ModelSpec
from pipeline.plan.ceilings import roofline
from pipeline.quant.spec import KV_CACHE_DTYPES, quant_spec
from pipeline.rehearse import on_random_weights
from pipeline.runners.runner import Session
from pipeline.runners.vllm import VllmRunner
from pipeline.runners.workload import Workload

log = logging.getLogger(__name__)

TRANSFORMERS = "transformers"
VLLM_PEERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "vllm-bf16": ("vLLM, bfloat16", ()),
    "vllm-fp8": ("vLLM, its online FP8", ("--quantization", "fp8")),
}
"""Name -> label, and how it differs from plain bfloat16."""

_CARD_LOADS = (1, 8, 64, 128), 128, 256
_CPU_LOADS = (1, 8), 64, 64
"""Batches up to the engine's limit, isl and osl, where the command line names no others."""
_MEMORY_SHARE = 0.05
_BLOCK_TOKENS = 16
"""vLLM's cache comes in blocks of so many tokens (`CacheConfig.DEFAULT_BLOCK_SIZE`, 0.24.0)."""
_SLACK = 1.1
_KV_DTYPE = "--kv-cache-dtype"
_SLOW_ROUNDS = 3
"""A round of Phi-3-mini's shape in Transformers at batches 1 to 128 takes over a minute (71 s by
the rates of an H200, 2026-11-24); of a ratio that large the second digit does not matter."""
LEVEL = 0.95
DRAWS = 10_000
"""Draws of the bootstrap: the ends of the interval repeat to less than its width over a hundred."""
MIN_ROUNDS = 3
"""With fewer rounds there is no interval. With three it is their whole range."""
_SEED = 20_251_125


@dataclass(frozen=True, kw_only=True)
class RaceRequest:
    """The command line; see `enginesmith race --help`. Empty or None: the default."""

    recipe: str
    overrides: tuple[str, ...]
    out: Path
    cpu: bool = False
    only: tuple[str, ...] = ()
    batches: tuple[int, ...] = ()
    isl: int | None = None
    osl: int | None = None
    rounds: int = 10
    random_weights: bool = False
    config_dir: Path | None = None

    @property
    def known_peers(self) -> tuple[str, ...]:
        return (TRANSFORMERS,) if self.cpu else (*VLLM_PEERS, TRANSFORMERS)


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A model in a runtime beside the engine; `max_rounds` where it is slow."""

    name: str
    label: str
    open: Callable[[], AbstractContextManager[Session]]
    max_rounds: int | None = None


def race(request: RaceRequest) -> Answer:
    """Make the artifact, measure it beside its peers, judge, and write the report.

    Exits with 1 where a peer failed, 3 where what was measured is worth nothing, as on a card that
    others use. IncompatibleError, before any download, if it cannot run here; ConflictError if the
    folder of the report is not empty.
    """
    recipe = compose(request)
    workloads = workloads_of(request, recipe)
    runtime, vllm = recipe.compiler.pinned_runtime, vllm_of(recipe)
    precision = partial(quant_spec, recipe.quantizer.precision)
    if not request.cpu and (reason := vllm.why_not_here(precision, runtime)):
        raise IncompatibleError(f"a race runs in vLLM on a GPU, or with --cpu: {reason}")
    require_builder(recipe.compiler.format)
    make_own(request.out, "--out", 0o755, team=True)
    if any(request.out.iterdir()):
        raise ConflictError(f"{request.out} is not empty; name another folder with --out")
    plan = plan_of(recipe)
    require_room(plan.build, cache_root())
    if request.random_weights:
        # Speed does not depend on them. The next command finds them by the shape's digest.
        folder = cache_root() / "random-weights" / digest_of({"shape": asdict(recipe.shape)})[:24]
        recipe = on_random_weights(recipe, recipe.shape, folder)
    with ExitStack() as stack:
        held = None if request.cpu else stack.enter_context(held_card())
        cache = StageCache(root=cache_root())
        weights = recipe.source.fetch()
        require_files(weights.dir, weights.files)
        checkpoint = recipe.quantizer.quantize(weights, recipe.calibration, cache)
        engine = recipe.compiler.compile(checkpoint, recipe.target, cache, request.out)
        opened, peers = contenders(request, recipe, weights, engine, workloads)
        with opened as session:
            speed, failed = measure_pairs(
                session,
                peers,
                workloads,
                rounds=request.rounds,
                vocab_size=recipe.shape.vocab_size,
                seed=recipe.acceptance.seed,
            )
    report, verdict = judge_race(recipe, engine, speed, failed, held)
    files = write_report(report, verdict, request.out, plan=plan.to_json())
    code = ExitCode.OK if verdict.name == "measured" else ExitCode.NOT_ACCEPTED
    lines = [f"{verdict.name}: {files[REPORT_FILE]}"]
    lines += [f"{one.kind}: {one.message}" for one in verdict.findings]
    return Answer(
        value=report.to_json(verdict),
        shown=[_table(speed), *lines],
        exit_code=ExitCode.FAILED if failed else code,
        message="\n".join(lines),
    )


def _table(entries: Sequence[Mapping[str, Any]]) -> Table:
    """Median rates, and ours over each peer with its interval, by workload."""
    table = Table("output tok/s, median", *(entry["workload"] for entry in entries))
    table.add_row("ours", *(f"{entry['output_tokens_per_s']:,.1f}" for entry in entries))
    labels = {
        name: peer["label"] for entry in entries for name, peer in entry.get("peers", {}).items()
    }
    for name, label in labels.items():
        peers = [entry["peers"].get(name) for entry in entries]
        rates = (f"{peer['output_tokens_per_s']:,.1f}" if peer else "-" for peer in peers)
        table.add_row(label, *rates)
        table.add_row("  ours / peer", *(_ratio(peer["ratio"]) if peer else "-" for peer in peers))
    return table


def _ratio(ratio: Mapping[str, Any]) -> str:
    """The median and its interval, such as `1.171 (1.168 to 1.174)`."""
    if ratio["low"] is None:
        return f"{ratio['median']:.3f}"
    return f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"


def compose(request: RaceRequest) -> Recipe:
    """The recipe with the compiler whose engines the race runs; no other may be asked for."""
    if any(override.split("=")[0] == "compiler" for override in request.overrides):
        fault = "a race chooses the compiler: checkpoint, or trtrtx with --cpu; leave it out"
        raise RecipeError([Fault("compiler", fault)])
    implied = ["compiler=trtrtx", "runner=onnxruntime"] if request.cpu else ["compiler=checkpoint"]
    folders = config_folders(request.config_dir)
    return load(request.recipe, [*implied, *request.overrides], folders=folders).value


def workloads_of(request: RaceRequest, recipe: Recipe) -> tuple[Workload, ...]:
    """The workloads, held against the artifact's limits; refused with all faults."""
    limits = recipe.compiler.limits
    batches, isl, osl = _CPU_LOADS if request.cpu else _CARD_LOADS
    isl, osl = request.isl or isl, request.osl or osl
    known = request.known_peers
    faults = [
        Fault("--only", f"{name!r} is no peer here; there are {', '.join(known)}")
        for name in request.only
        if name not in known
    ]
    faults += [
        Fault("--workloads", f"b{batch} exceeds compiler.max_batch_size ({limits.max_batch_size})")
        for batch in request.batches
        if batch > limits.max_batch_size
    ]
    if isl + osl > limits.max_seq_len:
        message = f"--isl + --osl ({isl + osl}) exceeds compiler.max_seq_len"
        faults.append(Fault("", f"{message} ({limits.max_seq_len}); make one of them smaller"))
    if faults:
        raise RecipeError(faults)
    chosen = request.batches or [one for one in batches if one <= limits.max_batch_size]
    return tuple(
        Workload(name=f"b{batch}", batch=batch, isl=isl, osl=osl) for batch in sorted(set(chosen))
    )


def vllm_of(recipe: Recipe) -> VllmRunner:
    """The recipe's runner if it is vLLM, else vLLM as it is shipped."""
    if isinstance(recipe.runner, VllmRunner):
        return recipe.runner
    return VllmRunner(**shipped("runner/vllm"))


def contenders(
    request: RaceRequest,
    recipe: Recipe,
    weights: Weights,
    engine: Engine,
    workloads: Sequence[Workload],
) -> tuple[AbstractContextManager[Session], Sequence[Peer]]:
    """What opens the engine, on a card as its manifest says with room for a peer, and its peers."""
    from pipeline.runners.transformers import open_source, open_source_in_child

    if request.cpu:
        label, opener = "Hugging Face generate, float32", partial(open_source, weights.dir)
        return recipe.runner.open(engine), (Peer(name=TRANSFORMERS, label=label, open=opener),)
    runner = vllm_of(recipe)

    def share_card(element_bytes: int) -> VllmRunner:
        cache = cache_bytes(recipe.shape, workloads, engine, element_bytes)
        arguments = (*runner.arguments, "--kv-cache-memory-bytes", str(cache))
        return replace(runner, gpu_memory_utilization=_MEMORY_SHARE, arguments=arguments)

    peers = []
    for name in request.only or request.known_peers:
        if name == TRANSFORMERS:
            limits = {"load_s": runner.load_timeout_s, "answer_s": runner.answer_timeout_s}
            source = {"weights_dir": str(weights.dir), "dtype": "bfloat16", "device": "cuda"}
            child = partial(open_source_in_child, **limits, **source)
            label = "Hugging Face generate, bfloat16"
            peers.append(Peer(name=name, label=label, open=child, max_rounds=_SLOW_ROUNDS))
            continue
        label, difference = VLLM_PEERS[name]
        serve = ("--dtype", "bfloat16", *shared_arguments(engine.serve_args), *difference)
        server = partial(share_card(2).open_folder, weights.dir, serve)
        peers.append(Peer(name=name, label=label, open=server))
    element_bytes = KV_CACHE_DTYPES[engine.limits.kv_cache_dtype].bytes_per_element
    return share_card(element_bytes).open_folder(engine.dir, engine.serve_args), peers


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
    """Bytes of KV cache for the largest workload, in whole blocks, with a tenth to spare.

    vLLM also demands room for one request of full length, the engine's `max_seq_len`.
    """

    def blocks(tokens: int) -> int:
        return -(-tokens // _BLOCK_TOKENS)

    held = max(load.batch * blocks(load.isl + load.osl) for load in workloads)
    wanted = int(_SLACK * max(held, blocks(engine.limits.max_seq_len))) + 1
    return shape.kv_bytes(wanted * _BLOCK_TOKENS, element_bytes)


def measure_pairs(
    engine: Session,
    peers: Sequence[Peer],
    workloads: Sequence[Workload],
    *,
    rounds: int,
    vocab_size: int,
    seed: int,
) -> tuple[tuple[Mapping[str, Any], ...], tuple[str, ...]]:
    """Measure an engine, which stays loaded, with each peer beside it, one after the other.

    Loads never overlap a round: while it loads, vLLM picks kernels by timing them (Inductor's
    `benchmark_combo_kernel`, FlashInfer's autotuning: config/compilation.py and config/kernel.py of
    vLLM 0.24.0), and what runs beside it would change its choice for good. Gives the report's
    `speed`, of the workloads that at least one pair ran, and what was not run.
    """
    runs: dict[str, list[SpeedSample]] = {load.name: [] for load in workloads}
    beside: dict[str, dict[str, Any]] = {load.name: {} for load in workloads}
    not_run = []
    for peer in peers:
        try:
            with peer.open() as session:
                log.info("%s is loaded", peer.label)
                for load in workloads:
                    waves = load.waves(load.request_prompts(vocab_size, seed), seed)
                    pair = {ENGINE: engine, peer.name: session}
                    turns = min(rounds, peer.max_rounds or rounds)
                    samples = measure_speed(load, pair, waves, turns)
                    ours, theirs = samples[ENGINE], samples[peer.name]
                    rates = ([run.output_tokens_per_s for run in side] for side in (ours, theirs))
                    figures = {**summarize(load, theirs), "ratio": ratio_of(*rates)}
                    ratio = figures["ratio"]["median"]
                    log.info("%s, %s: the engine is %.2f x as fast", peer.label, load.name, ratio)
                    runs[load.name] += ours
                    beside[load.name][peer.name] = {"label": peer.label, **figures}
        except PipelineError as error:
            log.warning("%s: %s", peer.label, error)
            not_run.append(f"{peer.label}: {error}")
    entries = tuple(
        {**summarize(load, runs[load.name]), "peers": beside[load.name]}
        for load in workloads
        if runs[load.name]
    )
    return entries, tuple(not_run)


def ratio_of(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Our rates over theirs, by round: the median, with an interval."""
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    low, high = median_interval(ratios) if len(ratios) >= MIN_ROUNDS else (None, None)
    return {
        "median": round(statistics.median(ratios), 5),
        "low": low,
        "high": high,
        "level": LEVEL,
        "rounds": len(ratios),
    }


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Ends of the 95 % bootstrap interval of the median."""
    drawn = np.random.default_rng(_SEED).choice(np.asarray(values), (DRAWS, len(values)))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(np.median(drawn, axis=1), [tail, 1 - tail])
    return round(float(low), 5), round(float(high), 5)


def judge_race(
    recipe: Recipe,
    engine: Engine,
    speed: tuple[Mapping[str, Any], ...],
    failed: tuple[str, ...],
    held: HeldCard | None,
) -> tuple[Report, Verdict]:
    """The report, and what acceptance's judge makes of it."""
    target, runner = recipe.target, recipe.runner if held is None else vllm_of(recipe)
    findings = [*spread_findings(speed, recipe.acceptance.max_spread)]
    findings += held.findings() if held else ()
    not_run = ["quality: a race measures speed only", *failed]
    if held is not None and held.card == target.card:
        plan = plan_of(recipe)
        line = roofline(plan.request, plan.sizes)
        findings += judge_physics(speed, line)
    else:
        not_run.insert(0, f"{target.card}: no such card here; speed on it")
    report = Report(
        digest=engine.digest,
        card=target.card,
        conditions=conditions_json(runner, recipe.acceptance.text, held),
        speed=speed,
        quality={},
        not_run=not_run,
        checks={},
    )
    verdict = judge(report, recipe.acceptance, ran=bool(speed), on_target=False, more=findings)
    if verdict.passed and speed:
        verdict = replace(verdict, name="measured")
    return report, verdict
