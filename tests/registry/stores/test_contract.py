"""What every store promises, proven on each: a folder, S3 and OCI, in memory and real servers."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.core.errors import CorruptError, NotFoundError
from pipeline.core.published import Package
from pipeline.registry.manifest import files_of, manifest_at, manifest_bytes
from pipeline.registry.store import ENVELOPE, Place, RawStatement
from pipeline.registry.stores.publication import WritableStore
from tests.registry.packages import envelopes, place_of, raw_statement, read_back, sealed_package

DAY_S = 24 * 3600.0
Ager = Callable[[float], None] | None


@pytest.fixture
def package(tmp_path: Path) -> Package:
    return sealed_package(tmp_path / "package")


def test_a_published_package_reads_back_whole_under_the_version_that_its_manifest_gives(
    store: WritableStore, package: Package
) -> None:
    sent: list[int] = []
    assert store.put_package(package, [raw_statement()], sent.append)
    place = place_of(package)
    assert store.places() == store.places("tiny") == store.places("tiny", place.variant) == [place]
    assert store.places("other") == store.places("tiny", "other") == []
    assert store.read_manifest(place) == manifest_bytes(package.manifest)
    assert manifest_at(store, place) == (package.manifest, package.digest)
    assert read_back(store, package) == {
        file.path: (package.dir / file.path).read_bytes() for file in files_of(package.manifest)
    }
    assert sum(sent) == sum(file.size_bytes for file in files_of(package.manifest))
    assert store.leftovers(0.0, delete=False) == []


def test_publishing_twice_is_doing_nothing(store: WritableStore, package: Package) -> None:
    assert store.put_package(package, [raw_statement()], lambda _: None)
    sent: list[int] = []
    assert not store.put_package(package, [raw_statement(text="2")], sent.append)
    assert sent == []
    assert [one.name for one in store.read_statements(place_of(package))] == [raw_statement().name]


def test_other_bytes_of_the_same_build_are_another_version(
    store: WritableStore, package: Package, tmp_path: Path
) -> None:
    other = sealed_package(tmp_path / "other", {"model.plan": b"other"})
    for one in (package, other):
        store.put_package(one, [], lambda _: None)
    assert store.places() == sorted([place_of(package), place_of(other)])
    assert place_of(package).version[:13] == place_of(other).version[:13]


def test_a_file_that_changed_since_it_was_sealed_is_not_published(
    store: WritableStore, package: Package
) -> None:
    path = package.dir / files_of(package.manifest)[0].path
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(CorruptError, match="is not what its manifest says"):
        store.put_package(package, [raw_statement()], lambda _: None)
    assert store.places() == []


def test_a_killed_publication_goes_on_by_whole_files_and_then_shows(
    store: WritableStore, tmp_path: Path
) -> None:
    files = {f"part-{number}.bin": os.urandom(9 << 20) for number in range(2)}
    package = sealed_package(tmp_path / "package", files)
    size_bytes = sum(map(len, files.values()))

    class KilledError(Exception):
        pass

    sent: list[int] = []

    def stop(count: int) -> None:
        sent.append(count)
        if sum(sent) > 13 << 20:
            raise KilledError

    with pytest.raises(KilledError):
        store.put_package(package, [raw_statement()], stop)
    assert store.places() == []
    assert store.put_package(package, [raw_statement()], lambda _: None)
    assert sum(map(len, read_back(store, package).values())) == size_bytes


def test_many_publishers_of_one_version_all_succeed(store: WritableStore, package: Package) -> None:
    with ThreadPoolExecutor(6) as pool:
        made = list(
            pool.map(
                lambda number: store.put_package(
                    package, [raw_statement(text=str(number))], lambda _: None
                ),
                range(6),
            )
        )
    assert any(made)
    assert len(read_back(store, package)) == 2
    assert store.leftovers(0.0, delete=False) == []


def test_a_range_of_a_file_can_be_read_and_a_missing_one_is_not_found(
    store: WritableStore, package: Package
) -> None:
    store.put_package(package, [], lambda _: None)
    file = next(one for one in files_of(package.manifest) if one.path == "engine/model.plan")
    with store.open_file(place_of(package), file, 3, 9) as chunks:
        assert b"".join(chunks)[:6] == b"nplanp"
    nowhere = Place(name="tiny", variant="other", version=place_of(package).version)
    with pytest.raises(NotFoundError):
        store.read_manifest(nowhere)
    with pytest.raises(NotFoundError), store.open_file(nowhere, file) as chunks:
        b"".join(chunks)


def test_statements_are_listed_read_by_envelope_and_read_whole(
    store: WritableStore, package: Package
) -> None:
    first = raw_statement(model_sig=b"sig")
    store.put_package(package, [first], lambda _: None)
    place = place_of(package)
    test = raw_statement("test", report_json=b'{"schema": 1}', report_html=b"<p>" * 100_000)
    assert store.put_statement(place, test)
    assert not store.put_statement(place, test)
    names = {first.name, test.name}
    (listed,) = store.listed()
    assert {place: names} == {one: set(known) for one, known in listed.versions.items()}
    assert envelopes(store.read_statements(place)) == envelopes([first, test])
    assert all(set(one.files) == {ENVELOPE} for one in store.read_statements(place))
    assert envelopes(store.read_statements(place, {test.name})) == envelopes([test])
    named = {file: hashlib.sha256(data).hexdigest() for file, data in test.files.items()}
    del named[ENVELOPE]
    read = store.read_attachments(place, test.name, {**named, "junit.xml": "0" * 64})
    assert {ENVELOPE: test.envelope, **read} == test.files


def test_rubbish_under_a_name_that_follows_from_content_stops_no_publisher(
    store: WritableStore, package: Package
) -> None:
    store.put_package(package, [], lambda _: None)
    place, first = place_of(package), raw_statement("yank")
    store.put_statement(place, RawStatement(name=first.name, files={ENVELOPE: b"rubbish"}))
    assert store.put_statement(place, first)
    assert not store.put_statement(place, first)
    assert first.envelope in [one.envelope for one in store.read_statements(place)]


def test_nothing_can_be_said_about_a_version_that_is_not_there(
    store: WritableStore, package: Package
) -> None:
    with pytest.raises(NotFoundError, match="publish it first"):
        store.put_statement(place_of(package), raw_statement())


def test_many_writers_lose_no_statement_and_no_move(store: WritableStore, package: Package) -> None:
    store.put_package(package, [], lambda _: None)
    place = place_of(package)
    statements = [raw_statement("test", str(number)) for number in range(24)]
    moves = [f'{{"move": {number}}}'.encode() for number in range(24)]
    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(lambda one: store.put_statement(place, one), statements))
        assert all(pool.map(lambda data: store.put_move("tiny", place.variant, data), moves))
    assert envelopes(store.read_statements(place)) == envelopes(statements)
    assert sorted(store.read_moves("tiny", place.variant)) == sorted(moves)
    assert not store.put_move("tiny", place.variant, moves[0])
    assert store.read_moves("tiny", "other") == []


def test_a_hint_is_overwritten_and_is_no_move(store: WritableStore, package: Package) -> None:
    store.put_package(package, [], lambda _: None)
    variant = place_of(package).variant
    for number in range(2):
        data = json.dumps({"digest": package.digest, "number": number}).encode()
        store.put_hint("tiny", variant, "candidate", "NVIDIA-L4", data)
    assert store.read_moves("tiny", variant) == []
    assert store.places() == [place_of(package)]


def test_a_registry_gets_one_identity_however_many_make_it(store: WritableStore) -> None:
    assert store.identity() is None
    barrier = threading.Barrier(6)

    def make(_: int) -> str:
        barrier.wait()
        return store.create_identity()

    with ThreadPoolExecutor(6) as pool:
        made = set(pool.map(make, range(6)))
    assert made == {store.identity()}
    assert len(made.pop()) == 32


def test_publishing_gives_a_registry_its_identity_and_checking_does_not(
    store: WritableStore, package: Package
) -> None:
    store.check_writable()
    assert store.identity() is None
    assert store.leftovers(0.0, delete=False) == []
    store.put_package(package, [], lambda _: None)
    assert store.identity() is not None


def test_removing_hides_a_package_at_once_and_its_files_go_a_day_later(
    store: WritableStore, package: Package, age: Ager
) -> None:
    store.put_package(package, [raw_statement()], lambda _: None)
    place, file = place_of(package), files_of(package.manifest)[0]
    if age is not None:
        age(2 * DAY_S)
    assert store.delete_package(place) > 0
    assert store.places() == []
    assert store.leftovers(DAY_S, delete=True) == []
    if age is None:  # of an OCI registry: its own collector takes blobs that no manifest names
        return
    with store.open_file(place, file) as chunks:
        assert hashlib.sha256(b"".join(chunks)).hexdigest() == file.sha256
    age(2 * DAY_S)
    assert len(store.leftovers(DAY_S, delete=False)) == 1
    for _ in range(2):  # the lease goes alone, after the files
        assert len(store.leftovers(DAY_S, delete=True)) == 1
    with pytest.raises(NotFoundError), store.open_file(place, file) as chunks:
        b"".join(chunks)
    assert store.leftovers(0.0, delete=False) == []


def test_a_removed_package_can_be_published_again(store: WritableStore, package: Package) -> None:
    store.put_package(package, [raw_statement()], lambda _: None)
    store.delete_package(place_of(package))
    assert store.put_package(package, [raw_statement()], lambda _: None)
    assert store.places() == [place_of(package)]
    assert store.delete_package(place_of(package)) > 0
    assert store.delete_package(place_of(package)) == 0


def test_the_clock_of_a_store_tells_the_time(store: WritableStore) -> None:
    store.create_identity()
    assert abs(store.now_s() - time.time()) < 60
