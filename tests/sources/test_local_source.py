"""The local source: what it takes, and how it names what is wrong with a folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from pipeline.core.errors import CorruptError, NotFoundError, RecipeError
from pipeline.sources.local import LocalSource
from tests.sources.tiny_model import BROKEN_SAFETENSORS, SHARDS, tiny_repository

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


@pytest.mark.parametrize("fault", BROKEN_SAFETENSORS)
def test_broken_shard_is_corrupt_and_named(folder: Path, fault: str) -> None:
    content, words = BROKEN_SAFETENSORS[fault]
    (folder / SHARDS[1]).write_bytes(content)

    with pytest.raises(CorruptError, match=words) as caught:
        source(folder).fetch()

    assert SHARDS[1] in str(caught.value)
    assert caught.value.exit_code == 4


def test_index_with_other_tensors_than_the_shards_is_corrupt(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"zz": SHARDS[0]}}))
    with pytest.raises(CorruptError, match="zz is missing"):
        source(folder).fetch()


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


def test_path_that_is_no_folder_is_not_found(folder: Path) -> None:
    with pytest.raises(NotFoundError, match="is not a folder"):
        source(folder / "config.json").fetch()


def test_pickles_only_is_a_recipe_fault(folder: Path) -> None:
    (folder / INDEX).unlink()
    with pytest.raises(RecipeError, match=r"only as pytorch_model\.bin.*save_pretrained"):
        source(folder).fetch()
