"""Weights from the Hugging Face Hub, at a pinned commit.

A repository's code is never fetched, so `trust_remote_code` cannot come into play: a model whose
`config.json` points to code (`auto_map`) is loaded by Transformers' own class or not at all.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

from pydantic.dataclasses import dataclass

from pipeline.core.errors import AccessError, TransientError
from pipeline.core.settings import STRICT
from pipeline.core.values import FileDigest, Licence, Weights
from pipeline.sources.weights import (
    FILES,
    Licensed,
    cached_files,
    check_listing,
    check_weights,
    support_files,
    weight_files,
    weights_root,
    write_record,
)

log = logging.getLogger(__name__)

_RECORD_BYTES = 1 << 20  # room for `weights.json` beside the files


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HubSource(Licensed):
    """A model repository.

    Attributes:
        repo_id: Such as `Qwen/Qwen2.5-7B-Instruct`.
        revision: Full commit, 40 hex digits: a branch or tag may move.
        gated: Its files need an account that accepted the licence; a missing token is then
            reported before anything is asked of the network.
        acknowledge_licence: Repeats `licence` once you have read it; gated weights are published
            only then.
    """

    repo_id: str
    revision: str
    gated: bool = False
    acknowledge_licence: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_repo_id(self.repo_id):
            raise ValueError(f"repo_id ({self.repo_id!r}) must be <owner>/<name>, as on the Hub")
        if not re.fullmatch(r"[0-9a-f]{40}", self.revision):
            raise ValueError(
                f"revision ({self.revision!r}) must be a full commit of 40 hex digits, because "
                f"branches and tags move; see the repository's history on the Hub"
            )

    @property
    def origin(self) -> str:
        return f"hub:{self.repo_id}"

    @property
    def terms(self) -> Licence:
        return replace(
            super().terms,
            gated=self.gated,
            acknowledged=self.acknowledge_licence,
            read_at=f"the page of {self.repo_id} on the Hub",
        )

    def fetch(self) -> Weights:
        """Download what the cache lacks. With a complete cache, neither network nor token."""
        slug = self.repo_id.replace("/", "--")
        folder = weights_root() / "hub" / slug / self.revision
        files = cached_files(folder, lambda: self._download(folder))
        return self.weights(folder / FILES, files, self.revision)

    def _download(self, folder: Path) -> tuple[FileDigest, ...]:
        """Fill the folder beside `folder` that keeps its name over runs, then rename it."""
        if self.gated and not os.environ.get("HF_TOKEN"):
            raise AccessError(
                f"{self.repo_id} is gated and HF_TOKEN is not set; accept its licence on the Hub, "
                "then set HF_TOKEN to a token of that account"
            )
        from pipeline.sources.hub_client import HubClient

        partial = _partial_folder(folder)
        arriving = partial / FILES
        client = HubClient(self.repo_id, self.revision)
        remote = client.describe().files
        where = f"{self.repo_id}@{self.revision[:12]}"
        check_listing(remote, where)
        arriving.mkdir(parents=True, exist_ok=True)
        files = [client.download(remote[name], arriving) for name in support_files(remote)]
        shards = weight_files(remote, arriving, where)
        missing = [name for name in shards if not (arriving / name).exists()]
        needed_bytes = sum(remote[name].size_bytes for name in missing) + _RECORD_BYTES
        if (free_bytes := shutil.disk_usage(arriving).free) < needed_bytes:
            raise TransientError(
                f"disk full: the download needs {needed_bytes / 1e9:,.1f} GB, {arriving} has "
                f"{free_bytes / 1e9:,.1f} GB free; free some, or set ENGINESMITH_CACHE "
                "to a folder on a larger disk, and run the same command again"
            )
        for number, name in enumerate(shards, start=1):
            size_mb = remote[name].size_bytes / 1e6
            log.info("%s: %d of %d, %s, %.0f MB", where, number, len(shards), name, size_mb)
            files.append(client.download(remote[name], arriving))
        check_weights(arriving, shards)
        for path in arriving.iterdir():
            if path.name not in {file.path for file in files}:
                path.unlink()  # left by a run of another version
        files.sort(key=lambda file: file.path)
        write_record(partial, origin=self.origin, commit=self.revision, files=files)
        partial.rename(folder)
        log.info("Fetched %s, %.1f MB", where, sum(file.size_bytes for file in files) / 1e6)
        return tuple(files)


def is_repo_id(text: str) -> bool:
    """Whether the Hub could have a repository of this name."""
    return bool(re.fullmatch(r"(?:\w[\w.-]*/)?\w[\w.-]*", text)) and not re.search(r"--|\.\.", text)


def _partial_folder(folder: Path) -> Path:
    """The working folder of a commit; a damaged finished one becomes it, so its good files stay."""
    partial = folder.with_name(f"{folder.name}.partial")
    if folder.exists():
        shutil.rmtree(partial, ignore_errors=True)
        folder.rename(partial)
    return partial


KIND = HubSource
