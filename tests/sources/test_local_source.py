"""The local source: what it takes, how it names what is wrong; licences of all sources."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import NotFoundError, RecipeError
from pipeline.sources.embedded import EmbeddedSource
from pipeline.sources.hub import HubSource
from pipeline.sources.local import LocalSource
from pipeline.sources.weights import known_licences, licence_of_hub
from tests.sources.tiny_model import SHARDS, tiny_repository

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good folder, with much in it that a build does not need."""
    for name, content in tiny_repository().items():
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_bytes(content)
    return tmp_path / "model"


def source(folder: Path) -> LocalSource:
    return LocalSource(path=folder, licence="Apache-2.0")


def test_folder_is_taken_where_it_is_with_the_digests_of_what_a_build_needs(folder: Path) -> None:
    weights = source(folder).fetch()

    names = [file.path for file in weights.files]
    assert (weights.dir, weights.commit) == (folder, None)
    assert names == sorted(names)
    assert {*SHARDS, INDEX, "config.json", "tokenizer.json", "LICENSE"} < set(names)
    assert not {"consolidated.safetensors", "pytorch_model.bin", "modeling_tiny.py"} & set(names)
    for file in weights.files:
        content = (folder / file.path).read_bytes()
        assert (file.size_bytes, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert weights.licence.files == ("LICENSE", "NOTICE.txt", "USE_POLICY.md")


def test_identity_follows_content_and_nothing_else(folder: Path) -> None:
    before = source(folder).fetch().digest
    moved = folder.rename(folder.with_name("elsewhere"))
    (moved / "README.md").write_text("other")
    assert source(moved).fetch().digest == before

    shard = bytearray((moved / SHARDS[0]).read_bytes())
    shard[-1] ^= 1
    (moved / SHARDS[0]).write_bytes(shard)
    assert source(moved).fetch().digest != before


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        (["config.json"], "has no config.json"),
        (["tokenizer.json"], "has no tokenizer"),
        ([INDEX, "pytorch_model.bin"], "has no weights"),
    ],
)
def test_incomplete_folder_is_not_found(folder: Path, missing: list[str], words: str) -> None:
    for name in missing:
        (folder / name).unlink()

    with pytest.raises(NotFoundError, match=words) as caught:
        source(folder).fetch()

    assert caught.value.exit_code == 7


def test_pickles_only_is_a_recipe_fault(folder: Path) -> None:
    (folder / INDEX).unlink()
    with pytest.raises(RecipeError, match=r"only as pytorch_model\.bin.*save_pretrained"):
        source(folder).fetch()


HUB: dict[str, Any] = {"repo_id": "acme/tiny", "revision": "0" * 40}
EMBEDDED: dict[str, Any] = {"package": "p", "requirement": "p==1", "file": "f", "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("kind", "keys"),
    [(HubSource, HUB), (LocalSource, {"path": Path("x")}), (EmbeddedSource, EMBEDDED)],
)
def test_licence_that_asks_for_a_notice_needs_one(kind: Any, keys: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"set source\.notice"):
        kind(**keys, licence="MIT", redistribution="with-notice", notice=" \n")


def test_table_of_licences_is_sound() -> None:
    table = known_licences()
    assert {"apache-2.0", "mit", "llama3.1", "llama3.2"} <= set(table)
    for terms in table.values():
        assert (terms.redistribution == "with-notice") == bool(terms.notice)
    assert licence_of_hub("unheard-of").redistribution == "forbidden"
