"""What we ask of the Hugging Face Hub: list the files of a commit, and download one of them.

`huggingface_hub` gives addresses, headers, session and errors. The download loop is ours because
the library's starts a file again after a kill (in 1.33 its temporary names are random) and never
compares digests: here the bytes gather in `<file>.part`, a later run continues them with a Range
request, and the whole file must have the digest that the commit's listing gives.

Files come over plain HTTP, which the Hub serves for its Xet storage too: Xet has no resume across
processes, and mirrors do not speak it. `HF_ENDPOINT` and `HF_TOKEN` are read when a client is made,
not when the library is imported, and no token is taken from anywhere else.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from pipeline.core.cache import sha256_file
from pipeline.core.errors import (
    AccessError,
    CorruptError,
    IncompatibleError,
    NotFoundError,
    PipelineError,
    TransientError,
)
from pipeline.core.values import FileDigest

log = logging.getLogger(__name__)

_TIMEOUT_S = 20.0
_WAITS_S = (1.0, 2.0, 4.0, 8.0)
"""Pauses between attempts that brought nothing; then it is the user's turn."""
_MAX_WAIT_S = 300.0
"""The Hub's rate limits count in windows of 5 minutes (its documentation, "Rate limits")."""
_CHUNK_BYTES = 1 << 16

_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True)
class RepoFacts:
    """What the Hub says about a repository at a revision.

    Attributes:
        commit: The full commit that the revision names.
        gated: Its files need an account that accepted the licence.
        licence: The repository's licence tag, such as `apache-2.0`; None where it states none.
    """

    commit: str
    gated: bool
    licence: str | None


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file of one commit, as the Hub lists it.

    Attributes:
        name: Path in the repository.
        size_bytes: Its length.
        sha256: Digest of a file in LFS or Xet storage; None for one stored in git.
        git_sha1: Git's object id of a file stored in git; of the pointer for the others.
    """

    name: str
    size_bytes: int
    sha256: str | None
    git_sha1: str

    def verify(self, path: Path) -> FileDigest:
        """Digest of the file at `path`, which must have this file's bytes; others are removed.

        Raises:
            CorruptError: Other bytes.
        """
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


class HubClient:
    """One repository at one commit.

    Args:
        repo_id: Such as `microsoft/Phi-3-mini-4k-instruct`.
        revision: Full commit; for `describe` also a branch or tag.
        repo_type: What it holds.

    Raises:
        IncompatibleError: `huggingface_hub` is not installed.
    """

    def __init__(
        self, repo_id: str, revision: str, repo_type: Literal["model", "dataset"] = "model"
    ) -> None:
        try:
            from huggingface_hub import constants
        except ImportError as error:
            raise IncompatibleError(
                "the Hub needs huggingface_hub: pip install 'enginesmith[build]'"
            ) from error

        self._repo_id = repo_id
        self._revision = revision
        self._repo_type = repo_type
        self._endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        self._token = os.environ.get("HF_TOKEN", "").strip() or None
        # At INFO this library logs addresses of the CDN, whose signatures grant access.
        logging.getLogger("httpx").setLevel(logging.WARNING)

    def describe(self) -> RepoFacts:
        """The commit that the revision names, and the repository's terms.

        Raises:
            NotFoundError: No such repository or revision.
            AccessError: It is private, or the token is not valid.
            TransientError: The network or the Hub fails again and again.
        """
        info = self._info(files_metadata=False)
        if not re.fullmatch(r"[0-9a-f]{40}", info.sha or ""):
            raise PipelineError(
                f"{self._endpoint} gives no commit for {self._repo_id}@{self._revision}; use an "
                "endpoint that does (unset HF_ENDPOINT)"
            )
        tags = (tag.partition(":") for tag in info.tags or ())
        licence = next((value for kind, _, value in tags if kind == "license"), None)
        return RepoFacts(commit=info.sha, gated=bool(info.gated), licence=licence)

    def _info(self, *, files_metadata: bool) -> Any:
        """The Hub's answer about the repository at the revision."""
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self._endpoint, token=self._token or False)
        return self._patiently(
            lambda: api.repo_info(
                self._repo_id,
                revision=self._revision,
                repo_type=self._repo_type,
                files_metadata=files_metadata,
                timeout=_TIMEOUT_S,
            )
        )

    def list_files(self) -> dict[str, RemoteFile]:
        """The commit's files by name.

        Raises:
            NotFoundError: No such repository or commit.
            AccessError: It is private, or the token is not valid.
            TransientError: The network or the Hub fails again and again.
        """
        info = self._info(files_metadata=True)
        if info.sha != self._revision:
            raise CorruptError(
                f"{self._endpoint} answered with commit {info.sha}, asked for {self._revision}"
            )
        files = {}
        for entry in info.siblings or ():
            if entry.size is None or entry.blob_id is None:
                raise PipelineError(
                    f"{self._endpoint} lists {entry.rfilename} without size and digest, so it "
                    "cannot be verified; use an endpoint that gives them (unset HF_ENDPOINT)"
                )
            files[entry.rfilename] = RemoteFile(
                name=entry.rfilename,
                size_bytes=entry.size,
                sha256=entry.lfs.sha256 if entry.lfs else None,
                git_sha1=entry.blob_id,
            )
        return files

    def download(
        self, file: RemoteFile, folder: Path, advance: Callable[[int], None] = lambda _: None
    ) -> FileDigest:
        """Bring `file` into `folder`, continuing what an earlier run left there.

        Args:
            file: What to bring.
            folder: Where it goes; it appears under its name only when it is whole and verified.
            advance: Told about every number of bytes that arrived.

        Raises:
            AccessError: Gated, and the token (if any) has no access.
            CorruptError: It arrived with other bytes than the Hub lists.
            TransientError: The network or the Hub fails again and again.
        """
        target = folder / file.name
        if target.exists():
            try:
                return file.verify(target)
            except CorruptError:
                log.warning("%s is damaged; downloading it again", target)
        part = part_of(target)
        try:
            self._patiently(
                lambda: self._continue(file, part, advance), progress=lambda: _size_or_zero(part)
            )
        finally:
            if part.exists() and not part.stat().st_size and file.size_bytes:
                part.unlink()  # nothing came, so there is nothing to continue
        digest = file.verify(part)
        part.rename(target)
        return digest

    def _continue(self, file: RemoteFile, part: Path, advance: Callable[[int], None]) -> None:
        """Fetch the bytes that `part` lacks."""
        have = _size_or_zero(part)
        if have > file.size_bytes:
            part.unlink()
            have = 0
        with part.open("ab") as stream:
            if have < file.size_bytes:
                with self._get(file.name, have) as (status, chunks):
                    if status != 206 and have:  # the server ignored the range: from the start
                        stream.truncate(0)
                        advance(-have)
                        have = 0
                    for chunk in chunks:
                        stream.write(chunk)
                        have += len(chunk)
                        advance(len(chunk))
                        if have > file.size_bytes:
                            break
            stream.flush()
            os.fsync(stream.fileno())
        if have < file.size_bytes:
            raise TimeoutError(f"the connection ended after {have:,} of {file.size_bytes:,} bytes")

    @contextlib.contextmanager
    def _get(self, name: str, offset: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        """Status and content of a file from `offset` on. Redirects lose the token on another host.

        `huggingface_hub` speaks through httpx since 1.0 and through requests before.
        """
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = hf_hub_url(
            self._repo_id,
            name,
            repo_type=self._repo_type,
            revision=self._revision,
            endpoint=self._endpoint,
        )
        headers = build_hf_headers(token=self._token or False)
        headers["Accept-Encoding"] = "identity"  # a range of a compressed file is of no use
        if offset:
            headers["Range"] = f"bytes={offset}-"
        session = get_session()
        if callable(session.stream):  # for requests it is a flag
            with session.stream(
                "GET", url, headers=headers, timeout=_TIMEOUT_S, follow_redirects=True
            ) as response:
                hf_raise_for_status(response)
                yield response.status_code, response.iter_bytes(_CHUNK_BYTES)
        else:
            with session.get(url, headers=headers, timeout=_TIMEOUT_S, stream=True) as response:
                hf_raise_for_status(response)
                yield response.status_code, response.iter_content(_CHUNK_BYTES)

    def _patiently(
        self, attempt: Callable[[], _Result], progress: Callable[[], int] = lambda: 0
    ) -> _Result:
        """Result of `attempt`, tried again while the fault may pass; progress renews patience."""
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        failures, mark = 0, progress()
        while True:
            asked_s = 0.0
            try:
                return attempt()
            except OfflineModeIsEnabled as error:
                raise AccessError(
                    f"HF_HUB_OFFLINE is set and {self._repo_id}@{self._revision[:12]} is not in "
                    "the cache; unset it, or fetch on a machine with network"
                ) from error
            except HfHubHTTPError as error:
                status = error.response.status_code
                if status not in {408, 429} and status < 500:
                    self._explain(error, status)
                asked_s = _retry_after_s(error.response)
                fault: Exception = error
                reason = f"HTTP {status}" + (", rate limited" if status == 429 else "")
            except _network_errors() as error:
                fault, reason = error, str(error) or type(error).__name__
            if (reached := progress()) > mark:
                failures, mark = 0, reached
            if failures == len(_WAITS_S):
                raise TransientError(
                    f"{self._endpoint}: {reason}, {failures + 1} times in a row; what arrived is "
                    "kept: run the same command again later"
                ) from fault
            wait_s = min(max(_WAITS_S[failures], asked_s), _MAX_WAIT_S)
            failures += 1
            log.warning("%s: %s; trying again in %.0f s", self._endpoint, reason, wait_s)
            time.sleep(wait_s)

    def _explain(self, error: Exception, status: int) -> NoReturn:
        """Raise what a refusal by the Hub means to the user."""
        from huggingface_hub.errors import (
            GatedRepoError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        folder = "datasets/" if self._repo_type == "dataset" else ""
        page = f"{self._endpoint}/{folder}{self._repo_id}"
        if isinstance(error, GatedRepoError) or status == 403:
            step = (
                f"the token in HF_TOKEN has no access: accept the licence at {page} with its "
                "account, wait if the owner must approve, and let the token read gated repositories"
                if self._token
                else f"accept its licence at {page}, then set HF_TOKEN to a token of that account"
            )
            raise AccessError(f"{self._repo_id} is gated; {step}") from error
        if isinstance(error, RevisionNotFoundError):
            raise NotFoundError(
                f"{self._repo_id} has no revision {self._revision}; copy the full commit from "
                f"{page}/commits/main"
            ) from error
        if isinstance(error, RepositoryNotFoundError) or status == 404:
            step = "the token in HF_TOKEN may not see it" if self._token else "HF_TOKEN is not set"
            raise NotFoundError(
                f"{self._endpoint} has no {self._repo_type} {self._repo_id} (or it is private and "
                f"{step}); check the spelling of repo_id"
            ) from error
        if status == 401:
            step = (
                "it does not take the token in HF_TOKEN; make a new one"
                if self._token
                else "it asks for a token; set HF_TOKEN"
            )
            raise AccessError(f"{page}: HTTP 401: {step}") from error
        raise PipelineError(f"{page}: HTTP {status}: {error}") from error


def part_of(target: Path) -> Path:
    """Where the bytes of `target` gather until they are whole."""
    return target.with_name(f"{target.name}.part")


def _size_or_zero(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _git_sha1(path: Path) -> str:
    """Git's object id of a file: the SHA-1 of its kind and length, a zero byte, and its content."""
    content = path.read_bytes()
    header = f"blob {len(content)}\0".encode()
    return hashlib.sha1(header + content, usedforsecurity=False).hexdigest()


def _retry_after_s(response: Any) -> float:
    """Seconds that the server asks to wait; 0 if it does not say.

    Beside the standard header the Hub sends `RateLimit: "api";r=0;t=55`: nothing remains, and the
    window ends in 55 s (IETF draft-ietf-httpapi-ratelimit-headers-09).
    """
    value = response.headers.get("Retry-After", "")
    if value.isdecimal():
        return float(value)
    window = re.search(r";\s*r=0\s*;\s*t=(\d+)", response.headers.get("RateLimit", ""))
    return float(window[1]) + 1 if window else 0.0


def _network_errors() -> tuple[type[Exception], ...]:
    """What a failing network raises, in either HTTP library; their own status errors are others."""
    found: list[type[Exception]] = [TimeoutError]
    for module, name in (("httpx", "TransportError"), ("requests", "RequestException")):
        with contextlib.suppress(ImportError):
            found.append(getattr(importlib.import_module(module), name))
    return tuple(found)
