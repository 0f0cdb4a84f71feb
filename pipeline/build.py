"""The pipeline: recipe, plan, fetch, quantize, convert, compile, package, accept, sign, publish."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.acceptance.abilities import ability_faults
from pipeline.acceptance.measure import measure
from pipeline.acceptance.report import REPORT_FILE, write_report
from pipeline.acceptance.subject import Subject
from pipeline.commands.outcome import Outcome
from pipeline.config.recipe import Recipe
from pipeline.core.cache import StageCache, cache_root, locked
from pipeline.core.errors import CorruptError, ExitCode, RecipeError, UntrustedError
from pipeline.core.values import (
    PASSING,
    Engine,
    Package,
    Verdict,
    VerdictName,
    Weights,
)
from pipeline.formats.spec import format_spec
from pipeline.identity import build_key, key_inputs, statement_name, version_of
from pipeline.machine import require_builder, require_room
from pipeline.model.read import load_config, spec_faults
from pipeline.plan import Plan, PlannedWorkload, PlanRequest, make_plan, refuse
from pipeline.quant.spec import quant_spec
from pipeline.registry.lifecycle.promote import enter_channel as move_into
from pipeline.registry.lifecycle.records import Author, actor_of
from pipeline.registry.lifecycle.yank import read_yank_of, require_build_not_yanked, told
from pipeline.registry.manifest import Label
from pipeline.registry.package import seal
from pipeline.registry.policy import require_publishable
from pipeline.registry.reference import reference_of
from pipeline.registry.signing.machine import Signatory, signatory_for
from pipeline.registry.signing.trust import TrustPolicy
from pipeline.registry.signing.verification import Verification, verify_signatures

log = logging.getLogger(__name__)

CHANNEL = "candidate"
"""Where a build ends; `stable` needs a signed test result of the card."""


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How to build, beside the recipe.

    Attributes:
        rebuild: Build although a package with the same build key is published.
        config: The resolved recipe as plain values, of which acceptance's key is made.
        cache_dir: Stage cache; None for the user's.
        environ: Names the key to sign with and whom to believe.
    """

    rebuild: bool
    config: Mapping[str, Any]
    cache_dir: Path | None = None
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)


def build(recipe: Recipe, run_dir: Path, options: BuildOptions) -> Outcome:
    """Build, check, sign and publish one recipe.

    Raises:
        PipelineError: Anything but a missed target, which is an outcome.
    """
    started, begun = time.perf_counter(), datetime.now(UTC)
    plan = plan_of(recipe)
    refuse(plan)
    require_publishable(recipe.source.terms, public=recipe.registry.public)
    own_folder = recipe.registry.local
    signatory = signatory_for(options.environ, run_dir.name, own_folder=own_folder)
    signatory.trust.require_may(signatory.key.public, "channels")
    author = Author(key=signatory.key, actor=actor_of(options.environ))
    recipe.registry.check_writable()
    recipe.compiler.check_machine(recipe.target)
    require_builder(recipe.compiler.format)
    cache = StageCache(root=options.cache_dir or cache_root())
    weights = fetch(recipe)
    key = build_key(recipe, weights)
    if not options.rebuild:
        require_build_not_yanked(
            recipe.registry.store,
            recipe.name,
            variant_of(recipe),
            version_of(recipe.version, key),
            signatory.trust,
        )
    # The second of two runs waits here, and then takes what the first one published.
    with locked(cache.root / "locks" / f"build-{key[:24]}.lock"):
        published = None if options.rebuild else find_published(recipe, key, signatory)
        if published and (known := known_acceptance(recipe, published, options.config)):
            enter_channel(
                recipe, published, author, signatory.trust
            )  # unless the earlier run was stopped before it did
            return finished(published.package, *known, started=started, taken=True)

        require_room(plan, cache.root)
        checkpoint = recipe.quantizer.quantize(weights, recipe.calibration, cache)
        engine = recipe.compiler.compile(checkpoint, recipe.target, cache, run_dir)
        if engine.twin_dir is not None:
            cache.keep_cpu_graph(key, engine.twin_dir)
        with recipe.registry.staging() as staging:
            if published:
                package = published.package
            else:
                package = seal(staging, engine, weights, label(recipe, engine, weights, key))
            subject = Subject(
                engine=engine,
                package_digest=package.digest,
                weights=weights,
                checkpoint_dir=checkpoint.dir,
                plan=plan,
                runner=recipe.runner,
            )
            verdict, files = judged(recipe, subject, package, cache, run_dir)
            if not verdict.passed:
                return missed(package, verdict, files[REPORT_FILE], started=started)
            if not published:
                signed = signatory.build_statements(package, begun)
                recipe.registry.publish(package, signed)
        name = signatory.statement_name(acceptance_name(recipe, package, options.config))
        result = signed_result(files, signatory)
        written = recipe.registry.add_statement(reference_of(package), name, result)
        verified = read_back(recipe, key, package, signatory)
        enter_channel(recipe, verified, author, signatory.trust)
        taken = published is not None
        return finished(
            verified.package, verdict.name, written / REPORT_FILE, started=started, taken=taken
        )


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
            workloads=tuple(
                PlannedWorkload(
                    name=workload.name,
                    batch=workload.batch,
                    isl=workload.isl,
                    osl=workload.osl,
                    min_output_tokens_per_s=workload.min_output_tokens_per_s,
                    min_share_of_ceiling=workload.min_share_of_ceiling,
                    mean_isl=workload.mean_isl(recipe.acceptance.seed),
                    mean_osl=workload.mean_osl(recipe.acceptance.seed),
                )
                for workload in recipe.acceptance.targets
            ),
            runtime=recipe.compiler.pinned_runtime,
            judged_positions=recipe.acceptance.judged_positions(recipe.shape),
            faults=ability_faults(recipe.acceptance, recipe.runner),
        )
    )


def variant_of(recipe: Recipe) -> str:
    """Middle part of the reference."""
    engine_format = format_spec(recipe.compiler.format)
    precision = quant_spec(recipe.quantizer.precision)
    return engine_format.variant(precision, recipe.compiler.limits, recipe.target)


def fetch(recipe: Recipe) -> Weights:
    """The weights, once they are known to be the model that the recipe planned with.

    Raises:
        RecipeError: Another model, or text that cannot judge it.
    """
    recipe.acceptance.check_inputs(
        recipe.shape, recipe.compiler.limits.max_seq_len, recipe.runner.device
    )
    weights = recipe.source.fetch()
    if faults := spec_faults(recipe.shape, load_config(weights.dir)):
        raise RecipeError(faults)
    recipe.acceptance.check_text(recipe.calibration.text.documents())
    return weights


def find_published(recipe: Recipe, key: str, signatory: Signatory) -> Verification | None:
    """The newest published package of this build whose bytes and signatures hold here.

    Yanked ones are passed over. One whose signatures do not hold is never signed afterwards: what
    it is made of, nobody here has seen.
    """
    registry = recipe.registry
    for package in registry.find(recipe.name, variant_of(recipe), key):
        reference = reference_of(package)
        try:
            statements = registry.statements_dir(reference)
            verified = verify_signatures(package, statements, signatory.trust)
        except (UntrustedError, CorruptError) as error:
            log.warning("%s is not taken, and is built beside it: %s", reference, error)
            continue
        if yank := read_yank_of(registry.store, reference, signatory.trust):
            log.warning("%s is not taken: it was yanked %s", reference, told(yank))
        else:
            log.info("Verified %s: every byte, and who signed it", reference)
            return verified
    return None


def judged(
    recipe: Recipe, subject: Subject, package: Package, cache: StageCache, run_dir: Path
) -> tuple[Verdict, dict[str, Path]]:
    """Put the question; the verdict, and the files of the report in `run_dir` by their names."""
    report, verdict = measure(recipe.acceptance, subject, cache)
    files = write_report(
        report,
        verdict,
        run_dir,
        manifest=package.manifest,
        reference=str(reference_of(package)),
        plan=subject.plan.to_json(),
        limits=recipe.acceptance.limits,
    )
    return verdict, files


def acceptance_name(recipe: Recipe, package: Package, config: Mapping[str, Any]) -> str:
    """Names the question that acceptance asks about a package."""
    asked = {name: dict(config[name]) for name in ("acceptance", "runner", "target")}
    asked["target"].pop("source", None)  # a citation
    return statement_name(recipe.acceptance.key(asked, recipe.runner, package.digest))


def signed_result(files: Mapping[str, Path], signatory: Signatory) -> dict[str, bytes | Path]:
    """The files of a report with the signature over exactly its bytes."""
    data = files[REPORT_FILE].read_bytes()
    return {**files, REPORT_FILE: data, **signatory.sign_report(data)}


def known_acceptance(
    recipe: Recipe, published: Verification, config: Mapping[str, Any]
) -> tuple[VerdictName, Path] | None:
    """Verdict and report of an earlier run of exactly this acceptance, if it passed.

    Signed ones only: what a report says by itself, anybody could have written.
    """
    name = acceptance_name(recipe, published.package, config)
    for found in published.verdicts:
        if found.statement.startswith(f"{name}-") and found.verdict in PASSING:
            folder = recipe.registry.statements_dir(reference_of(published.package))
            return found.verdict, folder / found.statement / REPORT_FILE
    return None


def enter_channel(
    recipe: Recipe, verified: Verification, author: Author, trust: TrustPolicy
) -> None:
    """Let `candidate` of the card point to a package, by a signed move.

    A log that this machine cannot believe, since its key is another one by now, begins afresh in a
    folder of its own; in any other registry a person has to look at it.

    Raises:
        UntrustedError: It has no signed verdict for the card, it is yanked, or the log of the
            channel cannot be believed.
        NotAcceptedError: Its newest signed verdict for the card does not pass.
        ConflictError: Somebody else moved the channel at the same time.
    """
    move_into(
        recipe.registry.store,
        reference_of(verified.package),
        channel=CHANNEL,
        card=recipe.target.card,
        author=author,
        policy=trust,
        restart=recipe.registry.local,
    )


def label(recipe: Recipe, engine: Engine, weights: Weights, key: str) -> Label:
    """What the package says beyond its engine and weights."""
    version = recipe.registry.next_version(
        recipe.name, engine.variant, version_of(recipe.version, key)
    )
    return Label(
        name=recipe.name,
        version=version,
        build_key=key,
        config=key_inputs(recipe, weights),
    )


def read_back(recipe: Recipe, key: str, package: Package, signatory: Signatory) -> Verification:
    """The package as a consumer finds it: every byte, its signature and its verdicts verified.

    Raises:
        CorruptError: What was published is not what was sealed.
    """
    found = find_published(recipe, key, signatory)
    if found is None or found.package.digest != package.digest:
        raise CorruptError(
            f"{recipe.name} was published, but its package does not read back with digest "
            f"{package.digest}; check the disk, then run the same command with --rebuild"
        )
    return found


def missed(package: Package, verdict: Verdict, report: Path, *, started: float) -> Outcome:
    """The outcome of a package that did not show what it must; it is not published."""
    reasons = [f"  {found.message}" for found in verdict.findings if found.kind != "note"]
    return Outcome(
        exit_code=ExitCode.NOT_ACCEPTED,
        verdict=verdict.name,
        digest=package.digest,
        report=report,
        message="\n".join(["built, but not accepted; nothing is published:", *reasons]),
        seconds=time.perf_counter() - started,
    )


def finished(
    package: Package, verdict: VerdictName, report: Path, *, started: float, taken: bool
) -> Outcome:
    """The outcome of a published package."""
    reference = reference_of(package)
    size_bytes = sum(file["size"] for file in package.manifest["files"])
    return Outcome(
        exit_code=ExitCode.OK,
        verdict=verdict,
        reference=str(reference),
        digest=package.digest,
        report=report,
        package_dir=package.dir,
        size_bytes=size_bytes,
        message=f"{'Taken, published before' if taken else 'Published'}: {reference}",
        seconds=time.perf_counter() - started,
        taken=taken,
    )
