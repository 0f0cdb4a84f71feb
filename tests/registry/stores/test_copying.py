"""From a folder to another registry: the same bytes and what trusted keys stated about them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from pipeline.core.errors import RecipeError, UntrustedError
from pipeline.registry.promotion import Copied, channels_of, copy
from pipeline.registry.reference import reference_of
from pipeline.registry.stores.folder import FolderRegistry
from pipeline.registry.stores.publication import WritableStore
from pipeline.registry.trust.signing import generate_key
from tests.registry.packages import place_of, read_back, read_files
from tests.registry.team import CARD, Team


@pytest.fixture(params=["folder", "memory_s3"])
def target(request: pytest.FixtureRequest) -> WritableStore:
    """Where to copy to; a URL alone must lead there."""
    found: WritableStore = request.getfixturevalue(f"{request.param}_store")
    return found


@pytest.fixture
def team(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Team:
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("ENGINESMITH_CACHE", str(tmp_path / "cache"))
    return Team(dir=tmp_path / "work", store=FolderRegistry(path=tmp_path / "source").store())


def run(
    team: Team, target: WritableStore, text: str, environ: Mapping[str, str] | None = None
) -> Copied:
    policy = None if environ is not None else team.policy_file()
    return copy(text, team.store.url, target.url, environ or {}, policy=policy)


def test_a_copy_has_the_bytes_the_signatures_and_the_results_and_no_channel(
    team: Team, target: WritableStore
) -> None:
    package = team.publish(verdict="accepted")
    team.enter(package)
    team.test(package, "rejected", key=generate_key())
    done = run(team, target, "tiny")
    assert (done.new, done.added) == (True, 3)
    assert done.resolved.package.digest == package.digest
    assert done.resolved.proof(CARD) is not None
    assert read_back(target, package) == read_back(team.store, package)
    assert channels_of(target, team.policy, "tiny") == []
    kinds = {raw.kind: raw for raw in target.read_statements(place_of(package))}
    assert set(kinds) == {"signature", "provenance", "test"}
    files = read_files(target, place_of(package), kinds["test"].name)
    assert files["report.html"] == b"<p>"


def test_copying_again_brings_only_what_is_new(team: Team, target: WritableStore) -> None:
    package = team.publish(verdict="accepted")
    text = str(reference_of(package))
    run(team, target, text)
    again = run(team, target, text)
    assert (again.new, again.added) == (False, 0)
    team.test(package, "regression")
    later = run(team, target, text)
    assert (later.new, later.added) == (False, 1)
    assert later.resolved.proof(CARD) is None


def test_a_yank_stays_in_the_registry_that_it_names(team: Team, target: WritableStore) -> None:
    package = team.publish()
    text = str(reference_of(package))
    run(team, target, text)
    team.yank(package)
    for raw in team.store.read_statements(place_of(package)):
        if raw.kind == "yank":
            target.put_statement(place_of(package), raw)
    team.yank(package, store=target)
    team.yank(package, store=target, undo=True)
    with pytest.raises(UntrustedError, match="yanked"):
        team.examine(package)
    team.yank(package, undo=True)
    assert run(team, target, text).resolved.yank is None


def test_this_machines_own_key_counts_for_no_registry_elsewhere(
    team: Team, memory_s3_store: WritableStore
) -> None:
    package = team.publish()
    home = team.dir / "home"
    home.mkdir(mode=0o700)
    (home / "local.key").write_bytes(team.builder.private_pem())
    (home / "local.key").chmod(0o600)
    environ = {"ENGINESMITH_CONFIG": str(home)}
    with pytest.raises(UntrustedError, match="enginesmith sign"):
        run(team, memory_s3_store, str(reference_of(package)), environ)
    near = FolderRegistry(path=team.dir / "near").store()
    assert run(team, near, str(reference_of(package)), environ).new


def test_a_registry_is_not_copied_to_itself(team: Team) -> None:
    with pytest.raises(RecipeError, match="the same registry"):
        run(team, team.store, "tiny")
