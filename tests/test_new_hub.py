"""`enginesmith new` from the Hub: a pinned commit, config.json alone, its terms."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.build import plan_of
from pipeline.config.folders import config_folders
from pipeline.config.load import load
from pipeline.config.recipe import Recipe
from pipeline.core.errors import AccessError, NotFoundError, RecipeError
from pipeline.new.command import NewRecipe, new_recipe, report
from pipeline.sources.hub import HubSource
from tests.sources.hub_server import COMMIT, REPO, TOKEN, HubServer
from tests.sources.tiny_model import SHARDS
from tests.specs import CONFIGS

CONFIG = (CONFIGS / "llama-3.2-1b-instruct.json").read_bytes()


@pytest.fixture(autouse=True)
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "recipes").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ENGINESMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return tmp_path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer(tags=("text-generation", "license:apache-2.0")) as server:
        server.files["config.json"] = CONFIG
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


def new(origin: str = REPO, **options: Any) -> NewRecipe:
    asked = {"revision": None, "target": "rtx4090", "config_dir": None}
    return new_recipe("mine", origin=origin, **(asked | options))


def loaded() -> Recipe:
    job = load("mine", [], folders=config_folders(None))
    assert job.faults == ()
    recipe: Recipe = job.value
    return recipe


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_recipe_pins_the_commit_whatever_named_it(hub: HubServer, revision: str | None) -> None:
    new(revision=revision)
    recipe = loaded()
    assert isinstance(recipe.source, HubSource)
    assert (recipe.source.repo_id, recipe.source.revision) == (REPO, COMMIT)
    assert plan_of(recipe).faults == ()
    shape = Path("recipes/shapes/mine.yaml").read_text()
    assert shape.startswith(f"# {REPO} on the Hugging Face Hub at commit {COMMIT}.")


def test_of_the_files_only_the_config_is_asked_for_and_the_cache_stays_empty(
    hub: HubServer, workdir: Path
) -> None:
    new()
    asked = {request.path.partition("?")[0] for request in hub.requests}
    files = {path for path in asked if not path.startswith(f"/api/models/{REPO}/revision/")}
    assert {path.rpartition("/")[2] for path in files} == {"config.json"}
    assert not (workdir / "cache").exists()


@pytest.mark.parametrize(
    ("tag", "licence", "redistribution"),
    [
        ("license:apache-2.0", "Apache-2.0", "allowed"),
        ("license:llama3.2", "LicenseRef-Llama-3.2-Community", "with-notice"),
        ("license:cc-by-nc-4.0", "LicenseRef-cc-by-nc-4.0", "forbidden"),
        ("region:us", "LicenseRef-unstated", "forbidden"),
    ],
)
def test_terms_follow_the_licence_tag(
    hub: HubServer, tag: str, licence: str, redistribution: str
) -> None:
    hub.tags = (tag,)
    new()
    terms = loaded().source.terms
    assert (terms.spdx, terms.redistribution, terms.gated) == (licence, redistribution, False)
    assert ("Built with Llama" in terms.notice) == (redistribution == "with-notice")


def test_gated_repository_needs_a_token_and_says_how_to_publish(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.gated, hub.tags = True, ("license:llama3.2",)
    with pytest.raises(AccessError, match="set HF_TOKEN"):
        new()
    assert list(Path("recipes").iterdir()) == []
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    made = new()
    terms = loaded().source.terms
    assert (terms.gated, terms.acknowledged) == (True, None)
    assert len(Path("recipes/mine.yaml").read_text().splitlines()) <= 28
    wanted = "source.acknowledge_licence=LicenseRef-Llama-3.2-Community"
    assert any(wanted in line for line in report(made, None))
    assert wanted in Path("recipes/mine.yaml").read_text().splitlines()[0]


def test_repository_without_a_model_or_with_pickles_only(hub: HubServer) -> None:
    for shard in SHARDS:
        del hub.files[shard]
    del hub.files["model.safetensors.index.json"]
    with pytest.raises(RecipeError, match="can run code"):
        new()
    del hub.files["config.json"]
    with pytest.raises(NotFoundError, match=r"has no config\.json"):
        new()


def test_hub_that_gives_no_commit_is_an_error_and_no_recipe(hub: HubServer) -> None:
    listing = hub.listing
    hub.listing = lambda: {**listing(), "sha": "main"}  # type: ignore[method-assign]
    with pytest.raises(Exception, match="gives no commit") as error:
        new()
    assert re.search("unset HF_ENDPOINT", str(error.value))
