"""Who may publish what where."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.core.errors import RecipeError
from pipeline.core.values import Licence
from pipeline.registry.backend import Registry
from pipeline.registry.folder import FolderRegistry
from pipeline.registry.package import seal, verify
from pipeline.registry.policy import publish_faults, require_publishable
from tests.registry.conftest import Bench

LLAMA = "LicenseRef-Llama-3.1-Community"
OPEN = Licence(spdx="MIT", redistribution="allowed")
GATED = Licence(
    spdx=LLAMA,
    redistribution="with-notice",
    notice="Built with Llama",
    gated=True,
    read_at="the page of meta-llama/Llama-3.1-8B-Instruct on the Hub",
)


@pytest.fixture
def staging(tmp_path: Path) -> Path:
    (tmp_path / "staging").mkdir()
    return tmp_path / "staging"


def paths(licence: Licence, **where: bool) -> list[str]:
    return [fault.path for fault in publish_faults(licence, **{"public": False, **where})]


@pytest.mark.parametrize("public", [False, True])
def test_open_weights_may_go_everywhere(public: bool) -> None:
    assert paths(OPEN, public=public) == []


def test_forbidden_redistribution_refuses_public_registries_only() -> None:
    closed = replace(OPEN, redistribution="forbidden")
    assert paths(closed) == []
    assert paths(closed, public=True) == ["registry"]


@pytest.mark.parametrize("public", [False, True])
def test_gated_weights_need_an_acknowledgement_of_their_own_licence(public: bool) -> None:
    wanted = ["source.acknowledge_licence"]
    assert paths(GATED, public=public) == wanted
    assert paths(replace(GATED, acknowledged="MIT"), public=public) == wanted
    assert paths(replace(GATED, acknowledged=LLAMA), public=public) == []


def test_message_says_what_to_read_and_which_key_to_set() -> None:
    with pytest.raises(RecipeError) as error:
        require_publishable(GATED, public=False)
    assert error.value.exit_code == 2
    assert "the page of meta-llama/Llama-3.1-8B-Instruct on the Hub" in str(error.value)
    assert f"set source.acknowledge_licence={LLAMA}" in str(error.value)


def test_all_faults_are_told_at_once() -> None:
    both = replace(GATED, redistribution="forbidden")
    assert paths(both, public=True) == ["source.acknowledge_licence", "registry"]


@pytest.mark.parametrize("licence", [OPEN, GATED])
def test_rehearsal_goes_to_a_throwaway_registry_and_nowhere_else(licence: Licence) -> None:
    for public in (False, True):
        assert paths(licence, public=public, random_weights=True) == ["registry"]
        assert paths(licence, public=public, random_weights=True, throwaway=True) == []


def test_folder_is_a_private_registry() -> None:
    registry: Registry = FolderRegistry(path=Path("x"))
    assert isinstance(registry, Registry)
    assert registry.public is False


def test_notice_travels_in_the_package_and_in_its_manifest(bench: Bench, staging: Path) -> None:
    weights = replace(bench.weights(), licence=GATED)
    package = seal(staging, bench.engine(), weights, bench.label())
    assert (package.engine_dir / "NOTICE").read_text() == "Built with Llama\n"
    assert package.manifest["licence"] == {
        "spdx": LLAMA,
        "files": ["NOTICE"],
        "redistribution": "with-notice",
        "notice": "Built with Llama",
    }
    assert verify(staging).digest == package.digest


@pytest.mark.parametrize("name", ["NOTICE", "Notice"])
def test_notice_joins_the_one_that_the_weights_have(bench: Bench, staging: Path, name: str) -> None:
    engine = bench.engine()
    (engine.dir / name).write_text("by acme\n")
    package = seal(staging, engine, replace(bench.weights(), licence=GATED), bench.label())
    assert (package.engine_dir / "NOTICE").read_text() == "by acme\n\nBuilt with Llama\n"
    assert [p.name for p in package.engine_dir.iterdir() if p.name.lower() == "notice"] == [
        "NOTICE"
    ]
    assert verify(staging).digest == package.digest


def test_without_a_notice_nothing_is_added(bench: Bench, staging: Path) -> None:
    package = seal(staging, bench.engine(), bench.weights(), bench.label())
    assert not (package.engine_dir / "NOTICE").exists()
    assert package.manifest["licence"] == {"spdx": "Apache-2.0", "files": ["LICENSE"]}
