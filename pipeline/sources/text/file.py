"""Text of the user's own: a plain file, a JSON-lines file or a Parquet file."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic.dataclasses import dataclass

from pipeline.core.errors import CorruptError, IncompatibleError, NotFoundError
from pipeline.core.settings import STRICT, PathField


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TextFile:
    """A local file: `.jsonl` has an object with the text a line, any other is one document."""

    path: PathField
    column: str = "text"

    @property
    def origin(self) -> str:
        return f"file:{self.path.name}"

    def documents(self) -> tuple[str, ...]:
        if not self.path.is_file():
            raise NotFoundError(f"{self.path} is no file; give the path of a text or .jsonl file")
        return read_documents(self.path, self.column)


def read_documents(path: Path, column: str) -> tuple[str, ...]:
    """Read the texts of a file, by its suffix; a `CorruptError` if it has none."""
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


KIND = TextFile
