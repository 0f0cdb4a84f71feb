"""Text of a Hub dataset at a commit, from a real server on loopback through the real library."""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.core.errors import CorruptError, IncompatibleError, NotFoundError
from pipeline.sources.text.hub import HubText
from tests.sources.hub_server import COMMIT, REPO, HubServer

JSONL = "answers.jsonl"
PARQUET = "3.0.0/validation-00000-of-00001.parquet"
TEXTS = ("The capital of France is Paris.", "Zwölf Boxkämpfer.")
LINES = "\n".join(json.dumps({"id": i, "response": text}) for i, text in enumerate(TEXTS))


def text(file: str, column: str = "response") -> HubText:
    return HubText(repo_id=REPO, revision=COMMIT, file=file, column=column)


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    files = {JSONL: LINES.encode(), "data/plain.txt": b"one document\n", PARQUET: b"PAR1" * 75_000}
    with HubServer(files=files, kind="dataset") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


def test_jsonl_is_one_document_a_line_and_fetched_once(hub: HubServer, cache: Path) -> None:
    assert text(JSONL).documents() == TEXTS
    assert text(JSONL).origin == f"hub-dataset:{REPO}@{COMMIT}/{JSONL}"
    stored = cache / "weights" / "hub-datasets" / REPO.replace("/", "--") / COMMIT / JSONL
    assert stored.read_bytes() == hub.files[JSONL]
    hub.requests.clear()
    assert text(JSONL).documents() == TEXTS
    assert hub.requests == []


def test_other_bytes_than_the_hub_lists_are_refused_and_removed(
    hub: HubServer, cache: Path
) -> None:
    hub.sent[JSONL] = LINES.replace("Paris", "Lyons").encode()
    with pytest.raises(CorruptError, match="the Hub lists"):
        text(JSONL).documents()
    assert not [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_missing_file_names_what_there_is(hub: HubServer) -> None:
    with pytest.raises(NotFoundError, match=rf"no file 'answer\.jsonl'; it has {PARQUET}"):
        text("answer.jsonl").documents()


@pytest.mark.parametrize("file", ["../secret.txt", "/etc/passwd", ""])
def test_path_that_leaves_the_repository_is_a_recipe_fault(file: str) -> None:
    with pytest.raises(ValueError, match="must be a path in the repository"):
        text(file)


def test_parquet_gives_its_column_or_names_what_to_install(hub: HubServer) -> None:
    if importlib.util.find_spec("pyarrow") is None:
        with pytest.raises(IncompatibleError, match="pip install pyarrow"):
            text(PARQUET).documents()
        return
    import pyarrow
    from pyarrow import parquet

    stream = io.BytesIO()
    table = pyarrow.table({"response": list(TEXTS), "id": [0, 1]})
    parquet.write_table(table, stream)
    hub.files[PARQUET] = stream.getvalue()
    assert text(PARQUET).documents() == TEXTS

    hub.files["broken.parquet"] = b"no parquet"
    with pytest.raises(CorruptError, match="not readable as"):
        text("broken.parquet").documents()
