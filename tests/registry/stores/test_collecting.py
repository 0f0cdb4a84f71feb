"""Many collectors at once, beside publishers, on every store."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.published import Package
from pipeline.registry.inventory import Collected, collect
from pipeline.registry.stores import folder_writing, publication
from pipeline.registry.stores.publication import WritableStore
from tests.registry.packages import place_of, raw_statement, read_back, sealed_package
from tests.registry.team import Team

COLLECTORS = 8
DAY_S = 24 * 3600.0
LONG_AGO = "2026-01-01T00:00:00.000000Z"


def test_many_collectors_and_publishers_at_once_all_succeed(
    tmp_path: Path,
    store: WritableStore,
    age: Callable[[float], None] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ENGINESMITH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    team = Team(dir=tmp_path / "work", store=store)
    with monkeypatch.context() as then:
        then.setattr("pipeline.registry.trust.signing.now_text", lambda after="": LONG_AGO)
        old = [team.publish(b"old", "accepted", name=f"m{number}") for number in range(5)]
    gone = old.pop()
    store.delete_package(place_of(gone))
    if age is not None:
        age(2 * DAY_S)
    packages = [gone, *(team.seal(b"new", name=f"m{number}") for number in range(3, 6))]
    start = threading.Barrier(COLLECTORS + len(packages))

    def run(job: Package | None) -> Collected | None:
        start.wait()
        if job is None:
            return collect(store, team.policy, delete=True)
        store.put_package(job, team.statements(job), lambda _: None)
        return None

    with ThreadPoolExecutor(COLLECTORS + len(packages)) as pool:
        done = list(filter(None, pool.map(run, [*packages, *[None] * COLLECTORS])))
    assert {place for one in done for place in one.removed} == set(map(place_of, old))
    assert set(store.places()) == set(map(place_of, packages))
    for package in packages:
        assert len(read_back(store, package)) == len(package.manifest["files"])
        assert team.examine(package).signer is not None


def test_a_publisher_goes_on_where_collectors_take_its_empty_folders(
    tmp_path: Path, folder_store: WritableStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count()

    def take_first(place: Callable[[Path, int, str], bool]) -> Callable[[Path, int, str], bool]:
        def placed(new: Path, folder: int, name: str) -> bool:
            if next(calls) % 10 != 9:
                with contextlib.suppress(OSError):  # it is not empty
                    Path(f"/proc/self/fd/{folder}").readlink().rmdir()
            return place(new, folder, name)

        return placed

    for name in ("_link", "_replace"):
        monkeypatch.setattr(folder_writing, name, take_first(getattr(folder_writing, name)))
    package = sealed_package(tmp_path / "package")
    assert folder_store.put_package(package, [], lambda _: None)
    assert len(read_back(folder_store, package)) == 2


@pytest.mark.parametrize("kind", ["folder_store", "memory_s3_store"])
@pytest.mark.parametrize("moment", ["found", "compared"])
def test_a_publisher_sends_again_what_a_late_collector_takes(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    kind: str,
    moment: str,
) -> None:
    """One that looked before the publisher's lease, and removes when the publisher has looked."""
    store: Any = request.getfixturevalue(kind)
    package = sealed_package(tmp_path / "package")
    store.put_package(package, [raw_statement()], lambda _: None)
    store.delete_package(place_of(package))
    left = [found.key for found in store.objects.listed("") if not found.key.endswith(".lease")]
    owner: Any = publication if moment == "compared" else type(store.objects)
    name = "holds" if moment == "compared" else "find"
    plain, lock = getattr(owner, name), threading.Lock()

    def then_taken(objects: Any, key: str, *more: Any) -> Any:
        with lock:
            found = plain(objects, key, *more)
            if found and "/engine/" in key:
                store.objects.delete(left)
                left.clear()
            return found

    monkeypatch.setattr(owner, name, then_taken)
    monkeypatch.setattr(publication, "SETTLE_S", 0.0)
    assert store.put_package(package, [raw_statement()], lambda _: None)
    assert left == []
    assert len(read_back(store, package)) == 2
    assert store.read_statements(place_of(package)) == [raw_statement()]
