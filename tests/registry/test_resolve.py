"""From a text to one verified package, on a registry in a folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.core.errors import CorruptError, NotFoundError, RecipeError, UntrustedError
from pipeline.publishing import Publisher
from pipeline.registry.reference import parse_reference, reference_of
from pipeline.registry.resolve import candidates, examine, resolve
from pipeline.registry.trust.signing import Signatory
from pipeline.registry.trust.verification import Resolved, Terms
from tests.registry.packages import VARIANT, place_of
from tests.registry.team import CARD, OTHER_CARD, Team


def find(team: Team, text: str, card: str | None = None, **more: bool) -> Resolved:
    return resolve(team.store, text, Terms(policy=team.policy, **more), card)


def test_a_package_is_found_by_version_digest_and_channel(team: Team) -> None:
    package = team.publish(verdict="accepted")
    team.publish(b"another")
    team.enter(package, "candidate")
    team.enter(package)
    version = reference_of(package).version
    for text in (
        f"tiny:{version}",
        f"tiny/{VARIANT}:{version}",
        f"tiny@sha256:{package.digest}",
        "tiny:candidate",
        f"tiny/{VARIANT}:stable",
        "tiny",
    ):
        found = find(team, text)
        assert found.package.digest == package.digest
        assert found.reference == reference_of(package)
        assert found.proof(CARD) is not None
        assert found.cards == (() if version in text or "@" in text else (CARD,))
    assert {raw.kind for raw in find(team, "tiny").statements} == {
        "signature",
        "provenance",
        "test",
    }


def test_a_channel_that_means_two_packages_is_ambiguous_without_a_card(team: Team) -> None:
    one, two = team.publish(b"one", "accepted"), team.publish(b"two")
    team.test(two, "accepted", OTHER_CARD)
    team.enter(one, "candidate")
    team.enter(two, "candidate", OTHER_CARD)
    with pytest.raises(RecipeError, match=rf"ambiguous: .*\({CARD}\).*\({OTHER_CARD}\)"):
        find(team, "tiny:candidate")
    assert find(team, "tiny:candidate", OTHER_CARD).package.digest == two.digest
    with pytest.raises(NotFoundError, match="for NVIDIA-H100"):
        find(team, "tiny:candidate", "NVIDIA-H100")
    found, refused = candidates(
        team.store, parse_reference("tiny:candidate"), Terms(policy=team.policy)
    )
    assert [one.cards for one in found] == [(CARD,), (OTHER_CARD,)]
    assert refused == []


def test_a_manifest_in_the_place_of_another_version_is_corrupt(team: Team, tmp_path: Path) -> None:
    package, other = team.publish(), team.publish(b"another")
    with pytest.raises(CorruptError, match="wanted 000000000000"):  # not what a channel named
        examine(team.store, place_of(package), Terms(policy=team.policy), "0" * 64)
    root = tmp_path / "artifacts" / "tiny" / VARIANT
    target = root / place_of(package).version / "manifest.json"
    target.chmod(0o644)
    shutil.copyfile(root / place_of(other).version / "manifest.json", target)
    with pytest.raises(CorruptError):
        team.examine(package)


def published(team: Team) -> Resolved | None:
    signatory = Signatory(key=team.builder, trust=team.policy, builder_id="", invocation_id="")
    publisher = Publisher(store=team.store, signatory=signatory, card=CARD)
    return publisher.find("tiny", VARIANT, "b" * 64)


def test_of_one_build_key_the_channels_package_stands_for_all_else_the_latest(team: Team) -> None:
    team.store.put_package(team.seal(b"unsigned"), [], lambda _: None)
    assert published(team) is None
    first, second = team.publish(b"one", "checked"), team.publish(b"two")
    team.publish(b"other build", build_key="b" * 8 + "c" * 56)
    found = published(team)
    assert found is not None
    assert found.package.digest == second.digest
    team.enter(first, "candidate")
    found = published(team)
    assert found is not None
    assert found.package.digest == first.digest


def test_a_build_whose_packages_are_all_yanked_is_refused(team: Team) -> None:
    first, second = team.publish(b"one"), team.publish(b"two")
    team.yank(second)
    found = published(team)
    assert found is not None
    assert found.package.digest == first.digest
    team.yank(first)
    with pytest.raises(UntrustedError, match=r"--undo --registry .* --rebuild"):
        published(team)
