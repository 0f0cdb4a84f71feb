"""Text of a Hub dataset."""

from __future__ import annotations

import re

from pydantic.dataclasses import dataclass

from pipeline.core.errors import NotFoundError
from pipeline.core.settings import STRICT
from pipeline.core.workfolder import hold_lock
from pipeline.sources.hub import HubClient
from pipeline.sources.text.file import read_documents
from pipeline.sources.weights import lock_path, weights_root


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HubText:
    """A file of a Hub dataset at a commit: `.jsonl`, `.parquet` (of both a column) or text."""

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
        """Those of the file in the weight cache, which is fetched and verified like a model's."""
        slug, commit = self.repo_id.replace("/", "--"), self.revision[:12]
        folder = weights_root() / "hub-datasets" / slug / self.revision
        target = folder / self.file
        with hold_lock(lock_path(folder)):
            # The client gives a file its name only when its digest was right.
            if not target.is_file():
                client = HubClient(self.repo_id, self.revision, "dataset")
                remote = client.describe().files
                if self.file not in remote:
                    have = ", ".join(sorted(remote))
                    message = f"{self.repo_id}@{commit} has no file {self.file!r}; it has {have}"
                    raise NotFoundError(message)
                target.parent.mkdir(parents=True, exist_ok=True)
                client.download(remote[self.file], folder)
        return read_documents(target, self.column)


KIND = HubText
