"""A race: acceptance's measuring with peers beside the engine, on a card or on this CPU.

The same clock, judge, report and page as acceptance. It measures speed only, so its verdict is
`measured` at best, which enters no channel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.acceptance.card import HeldCard, held_card
from pipeline.acceptance.judge import judge
from pipeline.acceptance.measure import conditions_json, rates_of
from pipeline.acceptance.pairs import Peer, measure_pairs
from pipeline.acceptance.peers import CARD_PEERS, TRANSFORMERS, card_peers, cpu_peer, engine_in_vllm
from pipeline.acceptance.physics import judge_physics
from pipeline.acceptance.report import REPORT_FILE, write_report
from pipeline.acceptance.speed import spread_findings
from pipeline.build import plan_of
from pipeline.config.folders import config_folders
from pipeline.config.load import load
from pipeline.config.recipe import Recipe
from pipeline.core.cache import StageCache
from pipeline.core.data import cache_root, shipped
from pipeline.core.errors import ConflictError, Fault, IncompatibleError, RecipeError
from pipeline.core.values import Engine, Report, Verdict, Weights, digest_of
from pipeline.machine import require_builder, require_room
from pipeline.plan.ceilings import roofline
from pipeline.rehearse.shrink import RandomSource, small_calibration, small_quantizer
from pipeline.runners.runner import Runner
from pipeline.runners.session import Session
from pipeline.runners.vllm import VllmRunner
from pipeline.runners.workload import Workload
from pipeline.sources.text.topics import PydocTopics

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

_CARD_LOADS = (1, 8, 64, 128), 128, 256
_CPU_LOADS = (1, 8), 64, 64
"""Batches up to the engine's limit, isl and osl, where the command line names no others."""


@dataclass(frozen=True, kw_only=True)
class RaceRequest:
    """The command line.

    Attributes:
        recipe: Name of the recipe.
        overrides: In Hydra's grammar.
        cpu: Race the engine's graph in ONNX Runtime on this CPU, against Transformers.
        only: Peers to race; empty for all.
        batches: Requests at once, one workload each; empty for the defaults.
        isl: Tokens of every prompt; None for the default.
        osl: Output tokens of every request; None for the default.
        rounds: Timed rounds of each pair at each workload.
        random_weights: Race on random weights of the recipe's shape.
        out: Folder of the report; None for `artifacts/.runs/race-<recipe>`.
        config_dir: Folder with the user's recipes.
    """

    recipe: str
    overrides: tuple[str, ...] = ()
    cpu: bool = False
    only: tuple[str, ...] = ()
    batches: tuple[int, ...] = ()
    isl: int | None = None
    osl: int | None = None
    rounds: int = 10
    random_weights: bool = False
    out: Path | None = None
    config_dir: Path | None = None

    @property
    def folder(self) -> Path:
        return self.out or Path("artifacts") / ".runs" / f"race-{self.recipe}"

    @property
    def peers(self) -> tuple[str, ...]:
        return self.only or ((TRANSFORMERS,) if self.cpu else CARD_PEERS)


@dataclass(frozen=True, kw_only=True)
class RaceResult:
    """What a race gave: the report as in `report.json`, where it is, and who failed."""

    document: Mapping[str, Any]
    report: Path
    verdict: Verdict
    failed: tuple[str, ...]


def race(request: RaceRequest) -> RaceResult:
    """Make the artifact, measure it beside its peers, judge, and write the report.

    Raises:
        RecipeError: The recipe or the command line is wrong.
        IncompatibleError: It cannot run here; known before anything is downloaded.
        ConflictError: The folder of the report is not empty.
    """
    recipe = compose(request)
    workloads = workloads_of(request, recipe)
    if not request.cpu and (reason := vllm_of(recipe).why_not_here(recipe.compiler.pinned_runtime)):
        raise IncompatibleError(f"a race runs in vLLM on a GPU, or with --cpu: {reason}")
    require_builder(recipe.compiler.format)
    if request.folder.exists() and any(request.folder.iterdir()):
        raise ConflictError(f"{request.folder} is not empty; name another folder with --out")
    plan = plan_of(recipe)
    require_room(plan, cache_root())
    if request.random_weights:
        recipe = on_random_weights(recipe, cache_root())
    request.folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        held = None if request.cpu else stack.enter_context(held_card())
        weights, engine = make_artifact(recipe, request.folder)
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
    report, verdict = judged(recipe, engine, speed, failed, held)
    files = write_report(report, verdict, request.folder, plan=plan.to_json())
    return RaceResult(
        document=report.to_json(verdict), report=files[REPORT_FILE], verdict=verdict, failed=failed
    )


def compose(request: RaceRequest) -> Recipe:
    """The recipe with the compiler whose engines the race runs.

    Raises:
        RecipeError: It is wrong, or another compiler is asked for.
    """
    if any(override.split("=")[0] == "compiler" for override in request.overrides):
        fault = "a race chooses the compiler: checkpoint, or trtrtx with --cpu; leave it out"
        raise RecipeError([Fault("compiler", fault)])
    implied = ["compiler=trtrtx", "runner=onnxruntime"] if request.cpu else ["compiler=checkpoint"]
    loaded = load(
        request.recipe,
        [*implied, *request.overrides],
        folders=config_folders(request.config_dir),
    )
    return loaded.value


def workloads_of(request: RaceRequest, recipe: Recipe) -> tuple[Workload, ...]:
    """The workloads, held against the artifact's limits.

    Raises:
        RecipeError: With all faults of the command line.
    """
    limits = recipe.compiler.limits
    batches, isl, osl = _CPU_LOADS if request.cpu else _CARD_LOADS
    isl, osl = request.isl or isl, request.osl or osl
    known = (TRANSFORMERS,) if request.cpu else CARD_PEERS
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


def on_random_weights(recipe: Recipe, cache_dir: Path) -> Recipe:
    """The recipe on random weights of its shape, calibrated on little text; downloads nothing.

    Speed does not depend on the values. The folder's name is the digest of the shape, so that the
    next command finds the weights again.
    """
    calibrate = PydocTopics(part="calibrate")
    name = digest_of({"shape": dataclasses.asdict(recipe.shape)})[:24]
    source = RandomSource(
        shape=recipe.shape,
        folder=cache_dir / "random-weights" / name,
        documents=calibrate.documents(),
    )
    return dataclasses.replace(
        recipe,
        source=source,
        calibration=small_calibration(recipe.calibration, calibrate),
        quantizer=small_quantizer(recipe.quantizer, recipe.shape),
    )


def make_artifact(recipe: Recipe, log_dir: Path) -> tuple[Weights, Engine]:
    """Fetch, quantize and compile, or take it from the cache."""
    cache = StageCache(root=cache_root())
    weights = recipe.source.fetch()
    checkpoint = recipe.quantizer.quantize(weights, recipe.calibration, cache)
    return weights, recipe.compiler.compile(checkpoint, recipe.target, cache, log_dir)


def contenders(
    request: RaceRequest,
    recipe: Recipe,
    weights: Weights,
    engine: Engine,
    workloads: tuple[Workload, ...],
) -> tuple[AbstractContextManager[Session], Sequence[Peer]]:
    """What opens the engine, and its peers."""
    if request.cpu:
        return recipe.runner.open(engine), (cpu_peer(weights.dir),)
    runner, shape = vllm_of(recipe), recipe.shape
    peers = card_peers(request.peers, runner, weights.dir, engine, shape, workloads)
    return engine_in_vllm(runner, engine, shape, workloads), peers


def judged(
    recipe: Recipe,
    engine: Engine,
    speed: tuple[Mapping[str, Any], ...],
    failed: tuple[str, ...],
    held: HeldCard | None,
) -> tuple[Report, Verdict]:
    """The report, and what acceptance's judge makes of it."""
    target = recipe.target
    runner: Runner = recipe.runner if held is None else vllm_of(recipe)
    findings = [*spread_findings(speed, recipe.acceptance.max_spread)]
    findings += held.findings() if held else ()
    not_run = ["quality: a race measures speed only", *failed]
    if held is not None and held.card == target.card:
        plan = plan_of(recipe)
        line = roofline(plan.request, plan.sizes)
        findings += judge_physics(rates_of(speed), line)
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
        verdict = dataclasses.replace(verdict, name="measured")
    return report, verdict
