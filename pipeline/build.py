"""The pipeline: recipe, plan, fetch, quantize, convert, compile, package, accept, sign, publish."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.acceptance.acceptance import Subject
from pipeline.acceptance.report import REPORT_FILE, write_report
from pipeline.config.recipe import Recipe, build_key, key_inputs
from pipeline.core.cache import StageCache
from pipeline.core.errors import RecipeError
from pipeline.core.published import Package
from pipeline.core.settings import cache_root
from pipeline.core.values import Checkpoint, Verdict, Weights
from pipeline.core.workfolder import hold_lock
from pipeline.formats.spec import format_spec
from pipeline.machine import require_builder, require_room
from pipeline.model.read import load_config, spec_faults
from pipeline.outcome import Outcome, outcome_of
from pipeline.plan import Plan, make_plan, refuse
from pipeline.plan.sizes import PlanRequest
from pipeline.publishing import Publisher
from pipeline.quant.spec import quant_spec
from pipeline.registry.package import Label, require_publishable, seal
from pipeline.registry.reference import reference_of
from pipeline.registry.trust.signing import signatory_for
from pipeline.registry.trust.verification import Resolved


def build(
    recipe: Recipe,
    run_dir: Path,
    *,
    config: Mapping[str, Any],
    rebuild: bool = False,
    cache_dir: Path | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Outcome:
    """Build, check, sign and publish one recipe; a missed target is an outcome.

    `config`: the recipe as plain values; `environ` names the key to sign with and whom to believe.
    """
    begun = datetime.now(UTC)
    plan = plan_of(recipe)
    refuse(plan)
    publisher = publisher_of(recipe, run_dir, environ)
    recipe.compiler.check_machine(recipe.target)
    require_builder(recipe.compiler.format)
    cache = StageCache(root=cache_dir or cache_root())
    weights = fetch(recipe)
    key = build_key(recipe, weights)
    # The second of two runs waits here, and then takes what the first one published.
    with hold_lock(cache.root / "locks" / f"build-{key[:24]}.lock"):
        found = None if rebuild else publisher.find(recipe.name, variant_of(recipe), key)
        if found and (taken := take(recipe, found, publisher, run_dir, config, environ)):
            return taken
        require_room(plan.build, cache.root)
        checkpoint = recipe.quantizer.quantize(weights, recipe.calibration, cache)
        engine = recipe.compiler.compile(checkpoint, recipe.target, cache, run_dir)
        format_spec(engine.format).require_files(engine.dir)
        if engine.cpu_graph_dir is not None:
            cache.keep_cpu_graph(key, engine.cpu_graph_dir)
        with publisher.staging() as staging:
            package = seal(staging, engine, weights, label(recipe, weights, checkpoint, key))
            subject = Subject(
                engine=engine,
                package_digest=package.digest,
                weights=weights,
                checkpoint_dir=checkpoint.dir,
                plan=plan,
                runner=recipe.runner,
            )
            verdict, files = run_acceptance(recipe, subject, package, cache, run_dir, publisher)
            if not verdict.passed:
                done = "built, but not accepted; nothing is published:"
                made = outcome_of(package, verdict, files[REPORT_FILE], done)
                return replace(made, reference=None, package_dir=None, size_bytes=None)
            published, new = publisher.publish(package, begun)
        question = acceptance_key(recipe, published.package, config)
        published = publisher.add_result(published, verdict, files, question)
        publisher.enter_candidate(published, environ, before=found)
        return outcome_of(
            publisher.local_copy(published), verdict, files[REPORT_FILE], taken=not new
        )


def publisher_of(recipe: Recipe, run_dir: Path, environ: Mapping[str, str]) -> Publisher:
    """What publishes the package; refused if registry, licence or policy do not let it."""
    store = recipe.registry.store()
    require_publishable(recipe.source.terms, public=store.public)
    signatory = signatory_for(environ, run_dir.name, own_folder=store.local)
    signatory.trust.require_may(signatory.key.public, "channels")
    store.check_writable()
    return Publisher(store=store, signatory=signatory, card=recipe.target.card)


def take(
    recipe: Recipe,
    found: Resolved,
    publisher: Publisher,
    run_dir: Path,
    config: Mapping[str, Any],
    environ: Mapping[str, str],
) -> Outcome | None:
    """A published package that passed exactly this acceptance; None if it has yet to be asked."""
    question = acceptance_key(recipe, found.package, config)
    known = publisher.known_result(found, question, run_dir)
    if known is None:
        return None
    verdict, files = known
    package = publisher.local_copy(found)
    publisher.enter_candidate(found, environ)  # should an earlier run have been stopped
    return outcome_of(package, Verdict(name=verdict), files[REPORT_FILE], taken=True)


def plan_of(recipe: Recipe) -> Plan:
    """What follows from a recipe alone; refuses nothing."""
    return make_plan(
        PlanRequest(
            name=recipe.name,
            shape=recipe.shape,
            target=recipe.target,
            format=format_spec(recipe.compiler.format),
            precision=quant_spec(recipe.quantizer.precision),
            keep_16bit=recipe.quantizer.keep_16bit,
            limits=recipe.compiler.limits,
            workloads=recipe.acceptance.targets,
            seed=recipe.acceptance.seed,
            runtime=recipe.compiler.pinned_runtime,
            judged_positions=recipe.acceptance.judged_positions(recipe.shape),
            faults=recipe.acceptance.ability_faults(recipe.runner),
        )
    )


def variant_of(recipe: Recipe) -> str:
    """Middle part of the reference."""
    engine_format = format_spec(recipe.compiler.format)
    precision = quant_spec(recipe.quantizer.precision)
    return engine_format.variant(precision, recipe.compiler.limits, recipe.target)


def fetch(recipe: Recipe) -> Weights:
    """The weights; refused if they are another model than planned, or the text does not fit."""
    recipe.acceptance.check_inputs(
        recipe.shape, recipe.compiler.limits.max_seq_len, recipe.runner.device
    )
    weights = recipe.source.fetch()
    if faults := spec_faults(recipe.shape, load_config(weights.dir)):
        raise RecipeError(faults)
    recipe.acceptance.check_text(recipe.calibration.text.documents())
    return weights


def run_acceptance(
    recipe: Recipe,
    subject: Subject,
    package: Package,
    cache: StageCache,
    run_dir: Path,
    publisher: Publisher | None,
) -> tuple[Verdict, dict[str, Path]]:
    """The verdict on a package, and the files of the report in `run_dir` by their names."""
    from pipeline.acceptance.measure import measure  # which imports torch

    report, verdict = measure(recipe.acceptance, subject, cache)
    files = write_report(
        report,
        verdict,
        run_dir,
        manifest=package.manifest,
        reference=str(reference_of(package)),
        registry=publisher.store.url if publisher else "",
        plan=subject.plan.to_json(),
        limits=recipe.acceptance,
        signed_by=publisher.signed_by if publisher else "",
    )
    return verdict, files


def acceptance_key(recipe: Recipe, package: Package, config: Mapping[str, Any]) -> str:
    """Names the question that acceptance asks about a package."""
    asked = {name: dict(config[name]) for name in ("acceptance", "runner", "target")}
    asked["target"].pop("source", None)  # a citation
    return recipe.acceptance.key(asked, recipe.runner, package.digest)


def label(recipe: Recipe, weights: Weights, checkpoint: Checkpoint, key: str) -> Label:
    """What the package states beyond its engine and weights."""
    return Label(
        name=recipe.name,
        recipe_version=recipe.version,
        build_key=key,
        config=key_inputs(recipe, weights),
        quantization=checkpoint.precision,
        ledger=checkpoint.calibration.get("ledger", {}),
    )
