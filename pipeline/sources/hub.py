"""Weights from the Hugging Face Hub, at a pinned commit.

A repository's code is never fetched, so `trust_remote_code` cannot come into play: a model whose
`config.json` points to code (`auto_map`) is loaded by Transformers' own class or not at all.

`huggingface_hub` downloads, retries and shows its progress. It never compares digests, so here
every file must have the digest that the commit's listing gives. `HF_ENDPOINT` and `HF_TOKEN` are
read when a client is made, and no token is taken from elsewhere.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic.dataclasses import dataclass

from pipeline.core.cache import sha256_file
from pipeline.core.errors import (
    AccessError,
    CorruptError,
    NotFoundError,
    PipelineError,
    TransientError,
)
from pipeline.core.patience import FACTOR, REPLY_S, Patience
from pipeline.core.published import FileDigest
from pipeline.core.settings import STRICT
from pipeline.core.values import Licence, Weights
from pipeline.core.workfolder import remove_folder
from pipeline.sources.language_model import language_model
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

_TIMEOUT_S = 20.0 * FACTOR
_LOOK_S = 0.05
_MAX_DOCUMENT_BYTES = 16 << 20
"""Of a reply but for the file in it: a listing of 10,000 files has 3 MB."""
_COMMIT = re.compile(r"[0-9a-f]{40}")
_Result = TypeVar("_Result")
_RECORD_BYTES = 1 << 20  # room for `weights.json` beside the files


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HubSource(Licensed):
    """A model repository.

    The files of a gated one need an account that accepted the licence; a missing token is then
    reported before anything is asked of the network.
    """

    repo_id: str  # such as `Qwen/Qwen2.5-7B-Instruct`
    revision: str  # full commit, 40 hex digits: a branch or tag may move
    gated: bool = False
    acknowledge_licence: str | None = None  # `licence` again, once read: to publish gated weights

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_repo_id(self.repo_id):
            raise ValueError(f"repo_id ({self.repo_id!r}) must be <owner>/<name>, as on the Hub")
        if not _COMMIT.fullmatch(self.revision):
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
        weights = self.weights(folder / FILES, files, self.revision)
        return language_model(weights, folder.with_name(f"{self.revision}-text"))

    def _download(self, folder: Path) -> tuple[FileDigest, ...]:
        """Fill the folder beside `folder` that keeps its name over runs, then rename it."""
        if self.gated and not os.environ.get("HF_TOKEN"):
            raise AccessError(
                f"{self.repo_id} is gated and HF_TOKEN is not set; accept its licence on the Hub, "
                "then set HF_TOKEN to a token of that account"
            )
        partial = folder.with_name(f"{folder.name}.partial")
        # A damaged one becomes the working folder, so its good files stay.
        if folder.is_dir() and not folder.is_symlink():
            remove_folder(partial)
            folder.rename(partial)
        remove_folder(folder)
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
                remove_folder(path)  # left by a run of another version
        files.sort(key=lambda file: file.path)
        write_record(partial, origin=self.origin, commit=self.revision, files=files)
        partial.rename(folder)
        log.info("Fetched %s, %.1f MB", where, sum(file.size_bytes for file in files) / 1e6)
        return tuple(files)


def is_repo_id(text: str) -> bool:
    """Whether the Hub could have a repository of this name."""
    return bool(re.fullmatch(r"(?:\w[\w.-]*/)?\w[\w.-]*", text)) and not re.search(r"--|\.\.", text)


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file of one commit, as the Hub lists it; `sha256` is None for one stored in git."""

    name: str
    size_bytes: int
    sha256: str | None
    git_sha1: str

    def verify(self, path: Path) -> FileDigest:
        """Digest of the file at `path`; with other bytes it is removed and a `CorruptError`."""
        found = FileDigest(path=self.name, size_bytes=path.stat().st_size, sha256=sha256_file(path))
        if self.sha256 is not None:
            kind, got, wanted = "SHA-256", found.sha256, self.sha256
        else:
            kind, got, wanted = "git object id", _git_sha1(path), self.git_sha1
        if got != wanted:
            path.unlink()
            raise CorruptError(
                f"{self.name}: the downloaded bytes have {kind} {got}, the Hub lists {wanted}; "
                "the file was removed: run the same command again, and if that repeats, suspect "
                "the mirror or proxy in between"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class Repository:
    """What the Hub says of a repository at a revision; `licence`: its tag, as `apache-2.0`."""

    commit: str
    gated: bool
    licence: str | None
    files: dict[str, RemoteFile]


class HubClient:
    """One repository at one commit; for `describe` also at a branch or tag.

    Its methods raise NotFoundError, AccessError or TransientError, each with a next step.
    """

    def __init__(
        self, repo_id: str, revision: str, repo_type: Literal["model", "dataset"] = "model"
    ) -> None:
        from huggingface_hub import constants

        self._repo_id = repo_id
        self._revision = revision
        self._repo_type = repo_type
        self._endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        self._token = os.environ.get("HF_TOKEN", "").strip() or None
        # Its own transport for large files cannot be watched: it keeps them in memory for a while.
        constants.HF_HUB_DISABLE_XET = True
        self._patience = Patience()
        # At INFO this library logs addresses of the CDN, whose signatures grant access.
        logging.getLogger("httpx").setLevel(logging.WARNING)

    def describe(self) -> Repository:
        """The commit that the revision names, its files, and the repository's terms."""
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self._endpoint, token=self._token or False)
        info: Any = self._explain(
            lambda: api.repo_info(
                self._repo_id,
                revision=self._revision,
                repo_type=self._repo_type,
                files_metadata=True,
                timeout=_TIMEOUT_S,
            )
        )
        commit = str(info.sha or "")
        if not _COMMIT.fullmatch(commit):
            raise PipelineError(
                f"{self._endpoint} gives no commit for {self._repo_id}@{self._revision}; use an "
                "endpoint that does (unset HF_ENDPOINT)"
            )
        if _COMMIT.fullmatch(self._revision) and commit != self._revision:
            raise CorruptError(
                f"{self._endpoint} answered with commit {commit}, asked for {self._revision}"
            )
        tags = (str(tag).partition(":") for tag in info.tags or ())
        return Repository(
            commit=commit,
            gated=bool(info.gated),
            licence=next((value for kind, _, value in tags if kind == "license"), None),
            files={entry.rfilename: self._remote_file(entry) for entry in info.siblings or ()},
        )

    def _remote_file(self, entry: Any) -> RemoteFile:
        if entry.size is None or entry.blob_id is None:
            raise PipelineError(
                f"{self._endpoint} lists {entry.rfilename} without size and digest, so it cannot "
                "be verified; use an endpoint that gives them (unset HF_ENDPOINT)"
            )
        return RemoteFile(
            name=entry.rfilename,
            size_bytes=entry.size,
            sha256=entry.lfs.sha256 if entry.lfs else None,
            git_sha1=entry.blob_id,
        )

    def download(self, file: RemoteFile, folder: Path) -> FileDigest:
        """Bring `file` into `folder`, unless it is there; a `CorruptError` for other bytes."""
        from huggingface_hub import hf_hub_download

        target = folder / file.name
        if not target.is_file():
            remove_folder(target)
        else:
            try:
                return file.verify(target)
            except CorruptError:
                log.warning("%s is damaged; downloading it again", target)
        self._explain(
            lambda: hf_hub_download(
                self._repo_id,
                file.name,
                repo_type=self._repo_type,
                revision=self._revision,
                local_dir=folder,
                token=self._token or False,
                endpoint=self._endpoint,
                etag_timeout=_TIMEOUT_S,
            ),
            (folder, file.size_bytes),
        )
        shutil.rmtree(folder / ".cache", ignore_errors=True)  # the library's own notes
        return file.verify(target)

    def _explain(
        self, attempt: Callable[[], _Result], arriving: tuple[Path, int] | None = None
    ) -> _Result:
        """Result of `attempt`; what the library raises becomes an error with a next step.

        `arriving` is where a file comes to, and how many bytes.
        """
        from huggingface_hub.errors import HfHubHTTPError

        try:
            return self._watched(attempt, arriving)
        except _errors() as error:
            if isinstance(error, OSError) and error.errno and not isinstance(error, HfHubHTTPError):
                raise  # the disk's
            raise self._meaning(error) from error
        except Exception as error:  # what the library raises where a server is no Hub
            found = f"{self._endpoint} does not answer as a Hub does ({error!r:.80})"
            raise TransientError(f"{found}; check the network and HF_ENDPOINT") from error

    def _watched(
        self, attempt: Callable[[], _Result], arriving: tuple[Path, int] | None
    ) -> _Result:
        """Result of `attempt`, in a thread that is left behind when nothing comes any more.

        The library has no deadline: a byte now and then, or a `Retry-After` of a year, and it
        waits. So the file that it fills is watched.
        """
        from huggingface_hub import get_session

        folder, size_bytes = arriving or (None, 0)
        limit_bytes = _MAX_DOCUMENT_BYTES + size_bytes
        session = get_session()
        session.headers["Accept-Encoding"] = "identity"
        if hasattr(session, "event_hooks"):  # not the build image's library, which has requests
            session.event_hooks["response"] = [functools.partial(_bound, limit_bytes)]
        result: Future[_Result] = Future()

        def run() -> None:
            try:
                result.set_result(attempt())
            except BaseException as error:  # raised again below
                result.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        seen_bytes = _received(folder)
        with self._patience.waiting():
            while not wait([result], _LOOK_S).done:
                there_bytes = _received(folder)
                self._patience.require(self._endpoint, max(0, there_bytes - seen_bytes))
                seen_bytes = there_bytes
        self._patience.left_s(earned_s=REPLY_S)
        return result.result()

    def _meaning(self, error: Exception) -> PipelineError:
        """What the Hub's refusal, or a failing network, means to the user."""
        from huggingface_hub import errors

        causes = _causes(error)
        status = next((s for cause in causes if (s := _status_of(cause))), None)
        token = self._token
        page = f"{self._endpoint}/{'datasets/' * (self._repo_type == 'dataset')}{self._repo_id}"
        if any(isinstance(cause, errors.OfflineModeIsEnabled) for cause in causes):
            return AccessError(
                f"HF_HUB_OFFLINE is set and {self._repo_id}@{self._revision[:12]} is not in "
                "the cache; unset it, or fetch on a machine with network"
            )
        if status is None or status in {408, 429} or status >= 500:
            if "Consistency check" in str(error):
                return CorruptError(
                    f"{self._repo_id}: {str(error).splitlines()[0]} Run the same command again, "
                    "and if that repeats, suspect the mirror or proxy in between"
                )
            reason = f"HTTP {status}" if status else str(causes[-1]) or type(causes[-1]).__name__
            return TransientError(
                f"{self._endpoint}: {reason}; whole files are kept: run the same command again "
                "later"
            )
        if isinstance(error, errors.GatedRepoError) or status == 403:
            step = (
                f"the token in HF_TOKEN has no access: accept the licence at {page} with its "
                "account, wait if the owner must approve, and let the token read gated repositories"
                if token
                else f"accept its licence at {page}, then set HF_TOKEN to a token of that account"
            )
            return AccessError(f"{self._repo_id} is gated; {step}")
        if isinstance(error, errors.RevisionNotFoundError):
            return NotFoundError(
                f"{self._repo_id} has no revision {self._revision}; copy the full commit from "
                f"{page}/commits/main"
            )
        if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
            step = "the token in HF_TOKEN may not see it" if token else "HF_TOKEN is not set"
            return NotFoundError(
                f"{self._endpoint} has no {self._repo_type} {self._repo_id} (or it is private and "
                f"{step}); check the spelling of repo_id"
            )
        if status == 401:
            step = "make a new one" if token else "there is none"
            return AccessError(
                f"{page}: HTTP 401: the Hub does not take the token in HF_TOKEN; {step}"
            )
        return PipelineError(f"{page}: HTTP {status}: {error}")


def _received(folder: Path | None) -> int:
    """Bytes of the file that the library fills; with other files of the folder."""
    files = folder.rglob("*.incomplete") if folder else ()
    with contextlib.suppress(FileNotFoundError):  # it was given its name just now
        return sum(path.stat().st_size for path in files)
    return 0


def _bound(limit_bytes: int, response: Any) -> None:
    """Let httpx read no more of a reply, and nothing that would grow when it is unpacked."""
    from httpx import RemoteProtocolError, SyncByteStream

    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise RemoteProtocolError("the reply is compressed against our wish")
    whole = response.stream

    class Bounded(SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            count = 0
            for chunk in whole:
                if (count := count + len(chunk)) > limit_bytes:
                    raise RemoteProtocolError(f"the reply is longer than {limit_bytes} bytes")
                yield chunk

        def close(self) -> None:
            whole.close()

    response.stream = Bounded()


def _git_sha1(path: Path) -> str:
    """Git's object id of a file: the SHA-1 of its kind and length, a zero byte, and its content."""
    content = path.read_bytes()
    header = f"blob {len(content)}\0".encode()
    return hashlib.sha1(header + content, usedforsecurity=False).hexdigest()


def _causes(error: BaseException) -> list[BaseException]:
    """The error and what it was raised from, the first cause last."""
    found = [error]
    while (cause := found[-1].__cause__ or found[-1].__context__) is not None:
        found.append(cause)
    return found


def _status_of(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _errors() -> tuple[type[Exception], ...]:
    """What the library raises: OSErrors, and those of httpx, which is below it since version 1."""
    with contextlib.suppress(ImportError):
        from httpx import TransportError

        return (OSError, TransportError)
    return (OSError,)


KIND = HubSource
