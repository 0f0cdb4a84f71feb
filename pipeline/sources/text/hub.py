"""Text of a Hub dataset."""

from __future__ import annotations

import re

from pydantic.dataclasses import dataclass

from pipeline.core.cache import sha256_file
from pipeline.core.errors import NotFoundError
from pipeline.core.ownership import CACHE, make_own, require_unshared
from pipeline.core.settings import STRICT
from pipeline.core.workfolder import hold_lock, remove_folder
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
        record = target.with_name(f".{target.name}.sha256")
        with hold_lock(lock_path(folder)):
            require_unshared(target, CACHE)
            kept = target.is_file() and record.is_file() and record.read_text()
            if not kept or kept != sha256_file(target):
                client = HubClient(self.repo_id, self.revision, "dataset")
                remote = client.describe().files
                if self.file not in remote:
                    have = ", ".join(sorted(remote))
                    message = f"{self.repo_id}@{commit} has no file {self.file!r}; it has {have}"
                    raise NotFoundError(message)
                remove_folder(target)
                make_own(target.parent, CACHE)
                record.write_text(client.download(remote[self.file], folder).sha256)
        return read_documents(target, self.column)


KIND = HubText
