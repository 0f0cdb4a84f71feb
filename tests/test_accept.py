"""Acceptance of a package that was built before; only the card is pretended."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipeline import accept as module
from pipeline.accept import AcceptRequest, accept
from pipeline.core.cache import digest_folder
from pipeline.core.errors import CorruptError, ExitCode, IncompatibleError, UntrustedError
from pipeline.core.hardware import target_of_card
from pipeline.registry.client.pull import PullRequest
from pipeline.registry.store import ENVELOPE, Place
from pipeline.registry.stores.folder import FolderRegistry
from tests.registry.packages import read_files
from tests.tiny import tiny_model
from tests.tiny_recipe import QUICK, Workplace

L4 = "NVIDIA-L4"
KEYS = tuple(override for override in QUICK if not override.startswith("compiler="))


@pytest.fixture
def place(
    built_checkpoint: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Workplace:
    copied = built_checkpoint.copy(tmp_path / "place")
    monkeypatch.setenv("ENGINESMITH_CACHE", str(copied.cache))
    monkeypatch.setattr(module, "this_card", lambda: target_of_card(L4))
    (tmp_path / "run").mkdir()
    return copied


def request(place: Workplace, target: str = "tiny:candidate", **changes: object) -> AcceptRequest:
    wanted = PullRequest(reference=target, registry=str(place.artifacts), environ=place.env)
    given = {"overrides": (*KEYS, "acceptance.windows=3"), "config_dir": place.recipes, **changes}
    return AcceptRequest(wanted=wanted, **given)  # type: ignore[arg-type]


def package_of(place: Workplace) -> Path:
    (package,) = place.packages()
    return package


def results(place: Workplace) -> dict[str, dict[str, object]]:
    """Name of the statement -> its report."""
    folder = package_of(place)
    found = folder.with_name(f"{folder.name}.statements").glob("*/report.json")
    return {path.parent.name: json.loads(path.read_text()) for path in found}


def test_result_for_another_card_is_added_and_the_package_is_not_touched(
    place: Workplace, tmp_path: Path
) -> None:
    before, said = digest_folder(package_of(place)), results(place)
    outcome = accept(request(place), tmp_path / "run")
    assert outcome.exit_code is ExitCode.OK
    assert outcome.verdict == "checked"
    assert digest_folder(package_of(place)) == before
    (added,) = set(results(place)) - set(said)
    assert results(place)[added]["card"] == L4
    folder = package_of(place)
    store = FolderRegistry(path=place.artifacts).store()
    where = Place(name="tiny", variant=folder.parent.name, version=folder.name)
    files = read_files(store, where, added)
    assert set(files) == {"report.json", "report.html", "junit.xml", ENVELOPE}


def test_missed_limit_is_exit_3_and_is_on_record(place: Workplace, tmp_path: Path) -> None:
    strict = (*KEYS, "acceptance.max_mean_kl_nats=1e-9")
    outcome = accept(request(place, overrides=strict), tmp_path / "run")
    assert outcome.exit_code is ExitCode.NOT_ACCEPTED
    assert outcome.verdict == "regression"
    assert "mean KL" in outcome.message
    assert [r["verdict"] for r in results(place).values() if r["card"] == L4] == ["regression"]


def test_folder_is_measured_and_nothing_is_written_beside_it(
    place: Workplace, tmp_path: Path
) -> None:
    said = results(place)
    outcome = accept(request(place, str(package_of(place))), tmp_path / "run")
    assert outcome.verdict == "checked"
    assert results(place) == said
    assert (tmp_path / "run" / "report.html").exists()


def test_unsigned_package_is_refused_before_anything_runs(place: Workplace, tmp_path: Path) -> None:
    folder = package_of(place)
    shutil.rmtree(folder.with_name(f"{folder.name}.statements"))
    with pytest.raises(UntrustedError, match="no trusted key signed it"):
        accept(request(place, str(folder)), tmp_path / "run")


def test_other_weights_than_the_package_was_made_from_are_refused(
    place: Workplace, tmp_path: Path
) -> None:
    other = tiny_model(tmp_path / "other", seed=1)
    keys = (*KEYS, f"source.path={other}", "name=tiny")
    with pytest.raises(CorruptError, match="was made from"):
        accept(request(place, overrides=keys), tmp_path / "run")


def test_without_a_card_it_is_exit_6_and_says_what_it_needs(tmp_path: Path) -> None:
    wanted = PullRequest(reference="tiny", registry=str(tmp_path))
    with pytest.raises(IncompatibleError, match="NVML"):
        accept(AcceptRequest(wanted=wanted), tmp_path / "run")
