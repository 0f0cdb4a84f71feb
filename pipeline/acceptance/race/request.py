"""What the command line of `enginesmith race` asks, held against the recipe."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.acceptance.race.transformers_contender import TRANSFORMERS
from pipeline.acceptance.race.vllm_contenders import VLLM_PEERS
from pipeline.config.folders import config_folders
from pipeline.config.load import load
from pipeline.core.data import shipped
from pipeline.core.errors import Fault, RecipeError
from pipeline.runners.workload import Workload

if TYPE_CHECKING:
    from pipeline.config.recipe import Recipe
    from pipeline.runners.vllm.runner import VllmRunner

PEERS = (*VLLM_PEERS, TRANSFORMERS)
"""Raced where no others are named."""
TRTLLM = "trtllm"
BATCHES = (1, 8, 64, 128)


@dataclass(frozen=True, kw_only=True)
class Request:
    """The command line.

    Attributes:
        recipe: Name of the recipe.
        overrides: In Hydra's grammar.
        only: Peers to race; empty for `PEERS`.
        batches: Requests at once, one workload each; empty for `BATCHES` up to the engine's limit.
        isl: Tokens of every prompt.
        osl: Output tokens of every request.
        rounds: Timed rounds of each pair at each workload.
        random_weights: Race on random weights of the recipe's shape.
        resume: Continue the race in `out`.
        out: Folder of the race; None for `artifacts/.runs/race-<recipe>`.
        time_limit_s: Stop before the round that would end later than this.
        config_dir: Folder with the user's recipes.
    """

    recipe: str
    overrides: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    batches: tuple[int, ...] = ()
    isl: int = 128
    osl: int = 256
    rounds: int = 10
    random_weights: bool = False
    resume: bool = False
    out: Path | None = None
    time_limit_s: float | None = None
    config_dir: Path | None = None

    @property
    def folder(self) -> Path:
        return self.out or Path("artifacts") / ".runs" / f"race-{self.recipe}"

    @property
    def peers(self) -> tuple[str, ...]:
        return self.only or PEERS

    def next_command(self) -> str:
        """The same race, continued."""
        words = ["enginesmith", "race", self.recipe, *self.overrides]
        if self.only:
            words += ["--only", ",".join(self.only)]
        if self.batches:
            words += ["--workloads", ",".join(f"b{batch}" for batch in self.batches)]
        words += ["--isl", str(self.isl), "--osl", str(self.osl), "--rounds", str(self.rounds)]
        if self.random_weights:
            words.append("--random-weights")
        if self.time_limit_s is not None:
            words += ["--time-limit-s", f"{self.time_limit_s:g}"]
        if self.config_dir is not None:
            words += ["--config-dir", str(self.config_dir)]
        return shlex.join([*words, "--out", str(self.folder), "--resume"])


def compose(request: Request) -> Recipe:
    """The recipe with the checkpoint compiler.

    Raises:
        RecipeError: It is wrong, or another compiler is asked for.
    """
    if any(override.split("=")[0] == "compiler" for override in request.overrides):
        fault = "a race is between runtimes that load checkpoints; leave compiler out"
        raise RecipeError([Fault("compiler", fault)])
    overrides = [*request.overrides, "compiler=checkpoint"]
    loaded = load(request.recipe, overrides, folders=config_folders(request.config_dir))
    return loaded.one_job().value


def workloads_of(request: Request, recipe: Recipe) -> tuple[Workload, ...]:
    """The workloads, held against the artifact's limits.

    Raises:
        RecipeError: With all faults of the command line.
    """
    limits = recipe.compiler.limits
    known = (*PEERS, TRTLLM)
    faults = [
        Fault("--only", f"{name!r} is no contender; there are {', '.join(known)}")
        for name in request.only
        if name not in known
    ]
    faults += [
        Fault("--workloads", f"b{batch} exceeds compiler.max_batch_size ({limits.max_batch_size})")
        for batch in request.batches
        if batch > limits.max_batch_size
    ]
    if request.isl + request.osl > limits.max_seq_len:
        told = f"--isl + --osl ({request.isl + request.osl}) exceeds compiler.max_seq_len"
        faults.append(Fault("", f"{told} ({limits.max_seq_len}); make one of them smaller"))
    if faults:
        raise RecipeError(faults)
    batches = request.batches or [one for one in BATCHES if one <= limits.max_batch_size]
    return tuple(
        Workload(name=f"b{batch}", batch=batch, isl=request.isl, osl=request.osl)
        for batch in sorted(set(batches))
    )


def runner_of(recipe: Recipe) -> VllmRunner:
    """The recipe's runner if it is vLLM, else vLLM as it is shipped; its timeouts are used."""
    from pipeline.runners.vllm.runner import VllmRunner

    if isinstance(recipe.runner, VllmRunner):
        return recipe.runner
    return VllmRunner(**shipped("runner/vllm"))
