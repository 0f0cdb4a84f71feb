"""What the folder store writes, and removes."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import ConflictError, CorruptError, NotFoundError, RecipeError
from pipeline.core.values import Package, Reference
from pipeline.registry.package import verify
from pipeline.registry.stores.folder import FolderStore
from pipeline.registry.stores.store import Place, WritableStore

Bench = Any
InChildren = Callable[[Sequence[Callable[[], object]]], list[int]]


@pytest.fixture
def store(bench: Bench) -> FolderStore:
    return FolderStore(path=bench.registry.path)


def _sealed(bench: Bench, folder: Path) -> Package:
    folder.mkdir()
    package: Package = bench.seal(folder)
    return package


def _left(store: FolderStore) -> list[Path]:
    return list((store.path / ".staging").iterdir())


def test_is_a_writable_store(store: FolderStore) -> None:
    assert isinstance(store, WritableStore)


def test_package_from_elsewhere_is_copied_and_stays_where_it_was(
    bench: Bench, store: FolderStore, tmp_path: Path
) -> None:
    package = _sealed(bench, tmp_path / "sealed")
    sent: list[int] = []
    place = Place(name="tiny", variant="sm89-trtrtx-fp8-b8", version="1.0-bbbbbbbbbbbb")
    assert store.put_package(package, {"signature": {"x.json": b"{}"}}, sent.append) is True
    assert sum(sent) == 402
    assert verify(store.location(place)).digest == package.digest
    assert verify(package.dir).digest == package.digest
    assert [one.name for one in store.statements(place)] == ["signature"]
    assert store.put_package(package, {"another": {"x.json": b"{}"}}, sent.append) is False
    assert [one.name for one in store.statements(place)] == ["signature"]
    assert _left(store) == []


@pytest.mark.parametrize("change", ["other", "longer", "missing", "link"])
def test_package_that_changed_is_not_copied(
    bench: Bench, store: FolderStore, tmp_path: Path, change: str
) -> None:
    package = _sealed(bench, tmp_path / "sealed")
    plan = package.engine_dir / "model.plan"
    if change in {"missing", "link"}:
        plan.unlink()
    if change == "link":
        plan.symlink_to("/dev/zero")
    if change in {"other", "longer"}:
        plan.write_bytes(b"nalp" * (100 if change == "other" else 1_000_000))
    with pytest.raises(CorruptError, match=r"model\.plan"):
        store.put_package(package, {"signature": {"x.json": b"{}"}})
    assert store.names() == []
    assert _left(store) == []


def test_move_is_written_once_and_by_one(store: FolderStore, in_children: InChildren) -> None:
    file = "candidate.L4.000001.dsse.json"
    jobs = [partial(store.put_move, "tiny", "v", file, bytes([number])) for number in range(4)]
    assert sorted(in_children(jobs)) == [0, 8, 8, 8]
    (data,) = store.moves("tiny", "v").values()
    assert len(data) == 1
    assert (store.path / "tiny" / "v" / "channels" / "log" / file).stat().st_nlink == 1
    assert store.channels("tiny", "v") == {}
    assert _left(store) == []


def test_move_needs_no_hard_links(store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*args: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    store.put_move("tiny", "v", "candidate.L4.000001.dsse.json", b"first")
    with pytest.raises(ConflictError, match="moved this channel meanwhile"):
        store.put_move("tiny", "v", "candidate.L4.000001.dsse.json", b"second")
    assert list(store.moves("tiny", "v").values()) == [b"first"]


def test_channel_is_replaced(store: FolderStore) -> None:
    for data in (b"one", b"two"):
        store.put_channel("tiny", "v", "stable.L4.json", data)
        assert store.channels("tiny", "v") == {"stable.L4.json": data}


@pytest.mark.parametrize("name", ["../x.json", "", ".hidden", "a/b"])
def test_names_cannot_leave_their_folder(store: FolderStore, name: str) -> None:
    for put in (store.put_move, store.put_channel):
        with pytest.raises(RecipeError):
            put("tiny", "v", name, b"x")
        with pytest.raises(RecipeError):
            put(name, "v", "stable.L4.json", b"x")


def test_deleted_version_is_gone_with_its_statements(bench: Bench, store: FolderStore) -> None:
    kept: Reference = bench.publish(label=bench.label("2.0"))
    reference: Reference = bench.publish()
    bench.accept(reference)
    place = Place.of(reference)
    size_bytes = sum(
        path.stat().st_size
        for folder in (store.location(place), store.statements_dir(place))
        for path in folder.rglob("*")
        if path.is_file()
    )
    assert store.delete_version(place) == size_bytes
    assert store.versions("tiny", place.variant) == [kept.version]
    assert not store.statements_dir(place).exists()
    assert _left(store) == []
    with pytest.raises(NotFoundError):
        store.read_manifest(place)
    assert store.delete_version(place) == 0


def test_leftovers_are_what_no_reader_sees_and_old_enough(
    bench: Bench, store: FolderStore, in_children: InChildren
) -> None:
    reference: Reference = bench.publish()
    bench.accept(reference)
    place = Place.of(reference)

    def die() -> None:
        with store.staging() as staging:
            (staging / "half").write_bytes(b"x" * 10)
            os.kill(os.getpid(), 9)

    assert store.leftovers(0.0, delete=True) == []
    assert in_children([die]) == [-9]
    gone = store.location(place).with_name("9.0-cccccccccccc.statements")
    (gone / "build-a").mkdir(parents=True)
    with store.staging() as mine:  # sweeps what the dead left
        assert in_children([die]) == [-9]
        assert store.leftovers(3600.0, delete=True) == []
        found = store.leftovers(0.0, delete=False)
        assert [line.split()[0].split("/")[-1] for line in found][1:] == [gone.name]
        assert len(found) == 2
        assert gone.exists()
        assert store.leftovers(0.0, delete=True) == found
        assert mine.exists()
        assert store.leftovers(0.0, delete=True) == []
    old_s = time.time() - 7200
    (gone / "build-a").mkdir(parents=True)
    os.utime(gone, (old_s, old_s))
    assert len(store.leftovers(3600.0, delete=True)) == 1
    assert [one.name for one in store.statements(place)] == ["test-1"]
