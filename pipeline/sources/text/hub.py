"""Text of a Hub dataset."""

from __future__ import annotations

import re

from pydantic.dataclasses import dataclass

from pipeline.core.settings import STRICT
from pipeline.sources.text.file import read_documents


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


KIND = HubText
