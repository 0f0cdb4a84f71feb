"""Who may write a version: one small object beside it, `<version>.claim`.

S3 can create one object exclusively, but not a package of many. So whoever publishes first creates
the claim, which names the digest; other bytes are refused while it stands, and the same bytes go on
where it stopped. Its holder writes it again every hour; nobody does for a day: then it is dead, and
a publisher of other bytes may take it over.

Ages are told by the server's clock. A holder that sleeps for a day between two requests, and then
goes on, could still write one file of a version that is another's by now: the read-back of both
tells.
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
import time
from dataclasses import dataclass, field

from pipeline.core.errors import ConflictError, CorruptError, TransientError
from pipeline.registry.stores.s3.bucket import Bucket, Content
from pipeline.registry.stores.store import Place

log = logging.getLogger(__name__)

DEAD_S = 24 * 3600.0
_KEEP_S = 3600.0
_MAX_BYTES = 4096
_TRIES = 8
REMOVAL = "removal"
"""In place of a digest: the version is being removed."""


@dataclass(kw_only=True)
class Claim:
    """A claim that this process holds.

    Attributes:
        bucket: Where.
        place: Of what.
        digest: Of the package, or `REMOVAL`.
        resumed: An earlier run of the same digest left something.
        taken_over: An earlier run of another digest did.
    """

    bucket: Bucket
    place: Place
    digest: str
    resumed: bool = False
    taken_over: bool = False
    _nonce: str = field(default_factory=lambda: secrets.token_hex(8))
    _etag: str = ""
    _kept_s: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def key(self) -> str:
        return self.bucket.address.claim(self.place)

    def take(self, *, dead_s: float = DEAD_S) -> None:
        """Create the claim, go on with one of the same digest, or take over a dead one.

        Args:
            dead_s: Age from which another digest's claim is dead.

        Raises:
            ConflictError: Somebody publishes other bytes.
            TransientError: Somebody removes the version.
        """
        for _ in range(_TRIES):
            if self.bucket.create(self.key, self._data()):
                self._note()
                return
            if (there := self._read()) is None:
                continue
            digest = _digest_of(there)
            if digest == self.digest:
                self.resumed = True
            elif there.age_s < dead_s:
                raise self._refusal(digest, there.age_s)
            else:
                log.info("Taking over %s, whose writer stopped", self.place)
                self.taken_over = True
            if self.bucket.replace(self.key, self._data(), there.etag):
                self._note()
                return
        raise TransientError(f"others keep claiming {self.place}; run the same command again")

    def keep(self, *, now: bool = False) -> None:
        """Show that we are alive, if that was not done for an hour.

        Args:
            now: Do it in any case; afterwards nobody takes the version over for a day.

        Raises:
            ConflictError: The version is another's by now.
        """
        with self._lock:
            if not now and time.monotonic() - self._kept_s < _KEEP_S:
                return
            if self._etag and self.bucket.replace(self.key, self._data(), self._etag):
                self._note()
            else:
                self.take(dead_s=float("inf"))

    def require(self) -> None:
        """Make sure, before anything is overwritten, that it is ours to overwrite.

        Raises:
            ConflictError: The version is another's, or was published meanwhile.
        """
        self.keep(now=True)
        # In this order: whoever published while our claim was dead has removed its own since.
        if self.bucket.head(self.bucket.address.manifest(self.place)) is not None:
            raise ConflictError(
                f"{self.place} was published by somebody else meanwhile; nothing was overwritten"
            )

    def clear(self) -> None:
        """Remove a claim of this digest, whoever left it: the version is published."""
        there = self._read()
        if there is not None and _digest_of(there) == self.digest:
            self.bucket.delete(self.key)

    def release(self) -> None:
        """Remove the claim, unless it is another's by now."""
        there = self._read()
        if there is not None and there.data == self._data():
            self.bucket.delete(self.key)

    def _read(self) -> Content | None:
        try:
            return self.bucket.read(self.key, _MAX_BYTES)
        except CorruptError as error:
            raise ConflictError(f"{error}, so it is no claim; remove it") from error

    def _note(self) -> None:
        there = self.bucket.head(self.key)
        self._etag = "" if there is None else there.etag
        self._kept_s = time.monotonic()

    def _data(self) -> bytes:
        value = {"schema": 1, "digest": self.digest, "nonce": self._nonce}
        return (json.dumps(value) + "\n").encode()

    def _refusal(self, digest: str, age_s: float) -> ConflictError | TransientError:
        alive = f"last heard of {age_s / 60:.0f} minutes ago"
        if digest == REMOVAL:
            return TransientError(f"{self.place} is being removed ({alive}); try again later")
        if self.digest == REMOVAL:
            return TransientError(f"{self.place} is being published ({alive}); try again later")
        return ConflictError(
            f"{self.place} is being published with other bytes (digest {digest[:12]}, these have "
            f"{self.digest[:12]}; {alive}); nothing was overwritten. Wait for that run, run the "
            "same command with --rebuild to publish beside it, or try again a day after it died"
        )


def _digest_of(there: Content) -> str:
    try:
        return str(json.loads(there.data)["digest"])
    except (ValueError, KeyError, TypeError):
        return "unknown"
