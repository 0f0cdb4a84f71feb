"""Text of the user's own: a plain file, a JSON-lines file, or a file of a Hub dataset."""

from __future__ import annotations

import json
import re
from pathlib import Path

from pydantic.dataclasses import dataclass

from pipeline.core.errors import CorruptError, IncompatibleError, NotFoundError
from pipeline.core.settings import STRICT, PathField


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TextFile:
    """A local file: `.jsonl` holds one object a line, anything else is one document.

    Attributes:
        path: The file.
        column: Key of the text in a JSON-lines object.
    """

    path: PathField
    column: str = "text"

    @property
    def origin(self) -> str:
        return f"file:{self.path.name}"

    def documents(self) -> tuple[str, ...]:
        if not self.path.is_file():
            raise NotFoundError(f"{self.path} is no file; give the path of a text or .jsonl file")
        return read_documents(self.path, self.column)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HubText:
    """A file of a Hub dataset at a commit: `.jsonl`, `.parquet` or plain text.

    Attributes:
        repo_id: Dataset repository, such as `abisee/cnn_dailymail`.
        revision: Commit, 40 hex digits.
        file: Path in the repository.
        column: Column or key of the text.
    """

    repo_id: str
    revision: str
    file: str
    column: str = "text"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-f]{40}", self.revision):
            raise ValueError(
                f"revision {self.revision!r} must be a full commit (40 hex digits), so that "
                "the calibration text cannot change under a build"
            )
        parts = self.file.split("/")
        if not all(parts) or {".", ".."} & set(parts):
            raise ValueError(
                f"file {self.file!r} must be a path in the repository, such as a/b.txt"
            )

    @property
    def origin(self) -> str:
        return f"hub-dataset:{self.repo_id}@{self.revision}/{self.file}"

    def documents(self) -> tuple[str, ...]:
        from pipeline.sources.hub_dataset import dataset_file

        return read_documents(dataset_file(self.repo_id, self.revision, self.file), self.column)


def read_documents(path: Path, column: str) -> tuple[str, ...]:
    """Read the texts of a file, by its suffix.

    Raises:
        CorruptError: It is not what its name says, or it holds no text.
        IncompatibleError: Parquet without pyarrow.
    """
    try:
        if path.suffix == ".jsonl":
            lines = path.read_text(encoding="utf-8").splitlines()
            texts = tuple(str(json.loads(line)[column]) for line in lines if line.strip())
        elif path.suffix == ".parquet":
            texts = _read_parquet(path, column)
        else:
            texts = (path.read_text(encoding="utf-8"),)
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptError(
            f"{path} is not readable as {path.suffix or 'text'} with column {column!r}: {error!r}"
        ) from error
    if not any(text.strip() for text in texts):
        raise CorruptError(f"{path} holds no text; choose another file or column")
    return texts


def _read_parquet(path: Path, column: str) -> tuple[str, ...]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise IncompatibleError(
            f"{path} is Parquet, which needs pyarrow: pip install pyarrow"
        ) from error
    return tuple(str(text) for text in parquet.read_table(path, columns=[column])[column])
