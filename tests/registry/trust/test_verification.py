"""Which statements about a package count, and what a store that adds junk cannot do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pipeline.core.errors import UntrustedError
from pipeline.core.published import Package
from pipeline.registry.reference import reference_of
from pipeline.registry.store import RawStatement
from pipeline.registry.trust.private_key import SigningKey
from pipeline.registry.trust.signing import place_fields, sign_statement, sign_test
from pipeline.registry.trust.verification import Resolved, Terms, require_usable, verify_statements
from tests.registry.team import BUILDER, CARD, OTHER_CARD, RUNTIME, Team

REGISTRY = "1" * 32
OTHER_RUNTIME = (RUNTIME[0], "1.0")


@pytest.fixture
def package(team: Team) -> Package:
    return team.seal()


def verify(team: Team, package: Package, *raws: RawStatement, **more: Any) -> Resolved:
    chosen = {"policy": team.policy, "registry": REGISTRY, "origin": "here", **more}
    return verify_statements(package, raws, **chosen)


def result(
    key: SigningKey, package: Package, verdict: Any, runtime: tuple[str, str] = RUNTIME
) -> RawStatement:
    return sign_test(package.digest, key, card=CARD, runtime=runtime, verdict=verdict, files={})


def yank(
    key: SigningKey, package: Package, *, yanked: bool = True, registry: str = REGISTRY
) -> RawStatement:
    fields = {
        "registry": registry,
        **place_fields(reference_of(package)),
        "yanked": yanked,
        "actor": "ada",
        "reason": "slow",
    }
    return sign_statement("yank", package.digest, fields, key)


def test_what_was_signed_for_another_purpose_changes_nothing(team: Team, package: Package) -> None:
    other, good = team.seal(b"other"), result(team.tester, package, "accepted")
    junk = [
        replace(good, name="test-" + "0" * 16),  # a copy under a new name
        replace(good, name=good.name.replace("test", "yank")),
        result(team.builder, package, "accepted"),  # trusted, but not for verdicts
        result(team.tester, other, "accepted"),
        yank(team.releaser, package, registry="2" * 32),
        yank(team.releaser, other),
    ]
    honest = [*team.statements(package), result(team.tester, package, "regression")]
    done = verify(team, package, *junk, *honest)
    assert len(done.ignored) == len(junk)
    assert replace(done, ignored=()) == verify(team, package, *honest)


def test_the_latest_signed_time_counts_whatever_the_order_in_the_store(
    team: Team, package: Package
) -> None:
    old = result(team.tester, package, "accepted")
    new = result(team.tester, package, "regression")
    for raws in ((old, new), (new, old)):
        done = verify(team, package, *raws)
        assert [one.verdict for one in done.verdicts] == ["regression", "accepted"]
        assert done.proof(CARD) is None


@pytest.mark.parametrize(
    ("verdicts", "proven"),
    [
        ([("accepted", RUNTIME)], True),
        ([("checked", RUNTIME)], False),
        ([("compiled", RUNTIME)], False),
        ([("accepted", OTHER_RUNTIME)], False),
        ([("accepted", RUNTIME), ("checked", ("onnxruntime", "1.22"))], True),
        ([("accepted", RUNTIME), ("rejected", RUNTIME)], False),
        ([("accepted", RUNTIME), ("regression", OTHER_RUNTIME)], True),
        ([("rejected", RUNTIME), ("accepted", RUNTIME)], True),
        ([], False),
    ],
)
def test_only_accepted_on_the_card_with_the_packages_own_runtime_proves(
    team: Team, package: Package, verdicts: Any, proven: bool
) -> None:
    raws = [result(team.tester, package, verdict, runtime=runtime) for verdict, runtime in verdicts]
    done = verify(team, package, *raws)
    assert (done.proof(CARD) is not None) is proven
    assert done.proven_cards == ((CARD,) if proven else ())
    assert done.proof(OTHER_CARD) is None


@pytest.mark.parametrize("registry", [REGISTRY, None])
def test_the_latest_yank_counts_and_may_be_undone(
    team: Team, package: Package, registry: str | None
) -> None:
    signed = team.statements(package)
    first = yank(team.releaser, package)
    undone = yank(team.releaser, package, yanked=False)
    again = yank(team.releaser, package)
    done = verify(team, package, *signed, first, registry=registry)
    assert done.yank is not None
    with pytest.raises(UntrustedError, match=r"yanked by ada at .*: slow.*--allow-yanked"):
        require_usable(done, Terms(policy=team.policy), "here")
    require_usable(done, Terms(policy=team.policy, allow_yanked=True), "here")
    assert verify(team, package, undone, first, registry=registry).yank is None
    assert verify(team, package, again, undone, first, registry=registry).yank is not None


def test_revoking_a_key_or_a_package_refuses_what_was_signed_before(
    team: Team, package: Package
) -> None:
    raws = team.statements(package)
    by_key = replace(team.policy, revoked_keys=(team.builder.public.keyid,))
    with pytest.raises(UntrustedError, match="is revoked"):
        require_usable(verify(team, package, *raws, policy=by_key), Terms(policy=by_key), "here")
    by_digest = replace(team.policy, revoked_digests=(f"sha256:{package.digest}",))
    done = verify(team, package, *raws, policy=by_digest)
    with pytest.raises(UntrustedError, match="is revoked"):
        require_usable(
            done, Terms(policy=by_digest, allow_unsigned=True, allow_yanked=True), "here"
        )


def test_a_policy_that_names_builders_requires_provenance_by_one_of_them(
    team: Team, package: Package
) -> None:
    signature, provenance = team.statements(package)
    good = replace(team.policy, builder_ids=("https://else.example", BUILDER))
    done = verify(team, package, signature, provenance, policy=good)
    require_usable(done, Terms(policy=good), "here")
    bad = replace(team.policy, builder_ids=("https://else.example",))
    for policy, raws in ((good, [signature]), (bad, [signature, provenance])):
        done = verify(team, package, *raws, policy=policy)
        with pytest.raises(UntrustedError, match="builder_ids"):
            require_usable(done, Terms(policy=policy), "here")


@pytest.mark.parametrize(
    "change",
    [
        {"verdict": "wonderful"},
        {"verdict": ["accepted"]},
        {"runtime": "vllm"},
        {"card": "../../etc"},
        {"card": None},
    ],
)
def test_a_trusted_test_result_of_another_form_does_not_count(
    team: Team, package: Package, change: Any
) -> None:
    fields = {"card": CARD, "runtime": {"name": "x", "version": "1"}, "verdict": "accepted"}
    raw = sign_statement("test", package.digest, {**fields, **change}, team.tester)
    done = verify(team, package, raw)
    assert (done.verdicts, done.statements) == ((), ())
    assert len(done.ignored) == 1
