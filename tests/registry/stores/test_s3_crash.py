"""SIGKILL of a publisher before each of its requests, and of the server under its hands."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.values import Package
from pipeline.registry.stores.s3 import S3Store
from tests.registry.stores.s3_packages import (
    PART_BYTES,
    SIGNATURES,
    assert_whole,
    child_job,
    keys,
    place_of,
    sealed,
)
from tests.registry.stores.s3_server import MemoryS3
from tests.services.seaweed import SeaweedServer

Bench = Any
InChildren = Callable[[Sequence[Callable[[], object]]], list[int]]

_SEED = 20261125


def _kill_before_request(number: int) -> None:
    """From now on, SIGKILL this process before it sends its `number`-th request."""
    from botocore.httpsession import URLLib3Session

    lock = threading.Lock()
    real = URLLib3Session.send
    left = number

    def send(self: Any, request: Any) -> Any:
        nonlocal left
        with lock:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return real(self, request)

    URLLib3Session.send = send


def _killed_at(number: int, store: S3Store, package: Package) -> Callable[[], object]:
    def job() -> None:
        _kill_before_request(number)
        child_job(store, package)()

    return job


def _check_and_complete(store: S3Store, package: Package) -> tuple[bool, bool]:
    """What a reader sees after a kill is nothing or all; the rerun completes it, and clears up.

    Returns whether the package was there before the rerun, and its statement.
    """
    place = place_of(package)
    there = bool(store.versions(place.name, place.variant))
    if there:
        assert_whole(store, package)
    statements = store.statements(place)
    for statement in statements:
        assert store.read_statement(place, statement.name) == SIGNATURES[statement.name]
    assert not there or statements
    assert store.put_package(package, SIGNATURES) is not there
    assert_whole(store, package)
    assert store.read_statement(place, "build-1") == SIGNATURES["build-1"]
    assert not any(key.endswith((".claim", "?")) for key in keys(store))
    return there, bool(statements)


@pytest.mark.slow
def test_sigkill_before_any_request_leaves_nothing_half_visible(
    store: S3Store, memory: MemoryS3, bench: Bench, tmp_path: Path, in_children: InChildren
) -> None:
    package = sealed(bench, tmp_path / "package", size_bytes=PART_BYTES + 10)
    seen = []
    number = 0
    while True:
        number += 1
        (code,) = in_children([_killed_at(number, store, package)])
        if code == 0:
            break
        assert code == -signal.SIGKILL
        seen.append(_check_and_complete(store, package))
        memory.objects.clear()
        memory.uploads.clear()
        store._bucket().etags.clear()
    # The kills hit all phases: before anything shows, after each thing shows.
    assert seen == sorted(seen)
    assert set(seen) == {(False, False), (False, True), (True, True)}
    assert number > 20


@pytest.mark.services
@pytest.mark.parametrize("number", sorted(random.Random(_SEED).sample(range(2, 28), 8)))
def test_sigkill_is_survived_on_a_real_server(
    s3: Callable[..., S3Store],
    bench: Bench,
    tmp_path: Path,
    in_children: InChildren,
    number: int,
) -> None:
    store = s3(part_bytes=PART_BYTES)
    package = sealed(bench, tmp_path / "package")
    (code,) = in_children([_killed_at(number, store, package)])
    assert code == -signal.SIGKILL
    _check_and_complete(store, package)


@pytest.mark.services
def test_server_that_dies_in_an_upload_and_comes_back_gets_the_rest(
    s3: Callable[..., S3Store], seaweed: SeaweedServer, bench: Bench, tmp_path: Path
) -> None:
    store = s3(part_bytes=PART_BYTES)
    package = sealed(bench, tmp_path / "package", size_bytes=60 << 20)
    sent: list[int] = []

    def die_once(count: int) -> None:
        if sum(sent) <= 20 << 20 < sum(sent) + count:
            seaweed.kill()
        sent.append(count)

    try:
        with pytest.raises(Exception, match=r"cannot publish"):
            store.put_package(package, SIGNATURES, die_once)
    finally:
        seaweed.restart()
    again: list[int] = []
    assert store.put_package(package, SIGNATURES, again.append)
    assert_whole(store, package)
    assert sum(again) < 60 << 20  # what had arrived was kept
