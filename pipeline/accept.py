"""Acceptance of a package that is built already, on this machine's card: `enginesmith accept`.

The package is only read. One signed statement comes beside it, whether it passed or not.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.acceptance.acceptance import Subject
from pipeline.acceptance.report import REPORT_FILE
from pipeline.build import acceptance_key, fetch, plan_of, run_acceptance
from pipeline.config.compose import config_folders
from pipeline.config.load import Job, load
from pipeline.config.recipe import Recipe
from pipeline.core.cache import StageCache
from pipeline.core.errors import CorruptError, Fault, IncompatibleError, RecipeError
from pipeline.core.gpu import read_conditions
from pipeline.core.hardware import Target, card_name, target_of_card
from pipeline.core.published import Package
from pipeline.core.settings import cache_root
from pipeline.core.values import Weights, engine_of
from pipeline.formats.spec import format_spec
from pipeline.machine import require_builder
from pipeline.outcome import Outcome, outcome_of
from pipeline.plan import refuse
from pipeline.publishing import Publisher
from pipeline.registry.client.pull import ARTIFACTS, PullRequest
from pipeline.registry.client.verify import named_folder, open_target
from pipeline.registry.reference import reference_of
from pipeline.registry.stores import open_store
from pipeline.registry.trust.signing import signatory_for

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AcceptRequest:
    """The command line; see `enginesmith accept --help`. Empty or None: the default."""

    wanted: PullRequest
    publish: bool = False
    overrides: tuple[str, ...] = ()
    recipe: str | None = None
    config_dir: Path | None = None


def accept(request: AcceptRequest, run_dir: Path) -> Outcome:
    """Run a package's acceptance on this machine's card; a missed target is an outcome.

    IncompatibleError without a card, or with one that we have no figures of, or cannot run it.
    """
    started = time.perf_counter()
    target = this_card()
    publisher = publisher_of(request, target, run_dir.name)
    resolved, package, _ = open_target(request.wanted, to_load=True)
    job = compose(request, package, target)
    recipe: Recipe = job.value
    plan = plan_of(recipe)
    refuse(plan)
    engine = engine_of(package)
    if reason := recipe.runner.why_not(engine):
        raise IncompatibleError(reason)
    require_builder(engine.format)
    subject = Subject(
        engine=engine,
        package_digest=package.digest,
        weights=same_weights(recipe, package),
        checkpoint_dir=engine.dir if format_spec(engine.format).is_checkpoint else None,
        plan=plan,
        runner=recipe.runner,
    )
    cache = StageCache(root=cache_root())
    verdict, files = run_acceptance(recipe, subject, package, cache, run_dir, publisher)
    if publisher is not None:
        publisher.add_result(resolved, verdict, files, acceptance_key(recipe, package, job.config))
    else:
        log.warning("No statement was added: use --publish with a reference in a registry")
    done = f"{'' if verdict.passed else 'not '}{verdict.name}: {reference_of(package)}"
    made = outcome_of(package, verdict, files[REPORT_FILE], done)
    return replace(made, seconds=time.perf_counter() - started)


def publisher_of(request: AcceptRequest, target: Target, run: str) -> Publisher | None:
    """What adds the result to the registry, with a key that may; None if it is added nowhere."""
    store = open_store(request.wanted.registry or ARTIFACTS)
    if named_folder(request.wanted.reference) or not (request.publish or store.local):
        return None
    signatory = signatory_for(request.wanted.environ, run, own_folder=store.local, builds=False)
    return Publisher(store=store, signatory=signatory, card=target.card)


def this_card() -> Target:
    """What is known of the card in this machine; refused without one, or where nothing is."""
    if (found := read_conditions()) is None:
        raise IncompatibleError(
            "accept measures a package on this machine's GPU, and NVML shows this process none; "
            "run it on a machine with the card (see nvidia-smi and CUDA_VISIBLE_DEVICES)"
        )
    card = card_name(found.gpu)
    if (target := target_of_card(card)) is None:
        raise IncompatibleError(
            f"nothing is known of {card}: its ceilings need conf/target/<id>.yaml with its "
            "bandwidth and tensor peaks; copy that of a similar card"
        )
    return target


def compose(request: AcceptRequest, package: Package, target: Target) -> Job:
    """The package's recipe, for this card and for what runs its format there."""
    folders, name = config_folders(request.config_dir), str(package.manifest["name"])
    if request.recipe is None and name not in folders.recipe_names():
        known = ", ".join(folders.recipe_names())
        message = (
            f"the package's name {name!r} is no recipe here; name the one that it was built from, "
            f"of {known}"
        )
        raise RecipeError([Fault("--recipe", message)])
    engine_format = format_spec(package.manifest["format"])
    limits = package.manifest["limits"]
    implied = {
        "compiler": engine_format.name,
        "target": target.id,
        "runner": engine_format.runner,
        **{f"compiler.{key}": limits[key] for key in ("max_batch_size", "max_seq_len")},
    }
    given = {override.split("=")[0] for override in request.overrides}
    overrides = [f"{key}={value}" for key, value in implied.items() if key not in given]
    return load(request.recipe or name, [*overrides, *request.overrides], folders=folders)


def same_weights(recipe: Recipe, package: Package) -> Weights:
    """The source that the package was made from, fetched again; CorruptError if it is another."""
    weights = fetch(recipe)
    wanted = package.manifest["source"]["digest"]
    if weights.digest != wanted:
        raise CorruptError(
            f"{reference_of(package)} was made from {package.manifest['source']['origin']} with "
            f"digest {wanted[:12]}, the recipe's source {weights.origin} has "
            f"{weights.digest[:12]}; name the recipe that it was built with: --recipe"
        )
    return weights
