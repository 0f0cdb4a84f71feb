"""What the S3 store promises, on a server in memory and on a real one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import pipeline
from pipeline.core.errors import (
    AccessError,
    ConflictError,
    CorruptError,
    NotFoundError,
    RecipeError,
)
from pipeline.registry.client.download import files_of
from pipeline.registry.manifest import MAX_MANIFEST_BYTES
from pipeline.registry.stores.s3 import S3Store
from pipeline.registry.stores.store import Place, WritableStore
from tests.registry.stores.s3_packages import (
    SIGNATURES,
    assert_whole,
    child_job,
    keys,
    place_of,
    read_file,
    sealed,
)

Bench = Any


def test_published_package_is_read_back_byte_for_byte(
    any_store: S3Store, bench: Bench, tmp_path: Path
) -> None:
    package = sealed(bench, tmp_path / "package")
    sent: list[int] = []
    assert isinstance(any_store, WritableStore)
    assert any_store.names() == []
    assert any_store.put_package(package, SIGNATURES, sent.append)
    assert_whole(any_store, package)
    place = place_of(package)
    assert any_store.names() == ["tiny"]
    assert any_store.variants("tiny") == [place.variant]
    assert any_store.read_statement(place, "build-1") == SIGNATURES["build-1"]
    assert sum(sent) == sum(file.size_bytes for file in files_of(package.manifest))
    large = max(files_of(package.manifest), key=lambda file: file.size_bytes)
    expected = (package.dir / large.path).read_bytes()
    for offset in (1, 5 << 20, (8 << 20) + 3, len(expected) - 1, len(expected)):
        assert read_file(any_store, place, large, offset) == expected[offset:]


def test_the_tree_is_the_folder_registrys_and_nothing_else_stays(
    any_store: S3Store, bench: Bench, tmp_path: Path
) -> None:
    package = sealed(bench, tmp_path / "package")
    any_store.put_package(package, SIGNATURES)
    place = place_of(package)
    version = f"tiny/{place.variant}/{place.version}"
    assert keys(any_store) == {
        f"{version}/manifest.json",
        f"{version}/engine/model.plan",
        f"{version}/engine/tokenizer/tokenizer.json",
        f"{version}.statements/build-1.statement",
        f"{version}.statements/build-1/manifest.dsse.json",
        f"{version}.statements/build-1/notes.html",
    }


def test_the_same_bytes_again_are_a_success_and_sent_once(
    any_store: S3Store, bench: Bench, tmp_path: Path
) -> None:
    package = sealed(bench, tmp_path / "package")
    assert any_store.put_package(package, {})
    sent: list[int] = []
    assert not any_store.put_package(package, {}, sent.append)
    assert sent == []


def test_other_bytes_under_one_version_are_a_conflict_and_change_nothing(
    any_store: S3Store, bench: Bench, tmp_path: Path
) -> None:
    first = sealed(bench, tmp_path / "first", seed=1)
    any_store.put_package(first, {})
    with pytest.raises(ConflictError, match="already published with other bytes"):
        any_store.put_package(sealed(bench, tmp_path / "second", seed=2), {})
    assert_whole(any_store, first)


@pytest.mark.parametrize("size_bytes", [100, 11 << 20])
def test_file_that_changed_since_it_was_sealed_never_shows(
    any_store: S3Store, bench: Bench, tmp_path: Path, size_bytes: int
) -> None:
    package = sealed(bench, tmp_path / "package", size_bytes=size_bytes)
    path = package.dir / "engine" / "model.plan"
    path.chmod(0o644)
    with path.open("r+b") as stream:
        stream.seek(size_bytes - 1)
        stream.write(bytes([path.read_bytes()[-1] ^ 1]))
    with pytest.raises(CorruptError, match="not what its manifest says"):
        any_store.put_package(package, {})
    assert any_store.versions("tiny", place_of(package).variant) == []
    assert not any("model.plan" in key for key in keys(any_store))
    assert not any(key.endswith(".claim") for key in keys(any_store))


def test_empty_file_and_odd_names_travel(any_store: S3Store, bench: Bench, tmp_path: Path) -> None:
    engine = bench.engine()
    (engine.dir / "empty").write_bytes(b"")
    (engine.dir / "with space+plus").write_bytes(b"1")
    (tmp_path / "package").mkdir()
    package = bench.seal(tmp_path / "package", engine)
    any_store.put_package(package, {})
    assert_whole(any_store, package)


def test_of_many_publishers_of_other_bytes_one_wins(
    any_store: S3Store, bench: Bench, tmp_path: Path, in_children: Any
) -> None:
    packages = [sealed(bench, tmp_path / str(seed), seed=seed) for seed in range(4)]
    codes = in_children([child_job(any_store, package) for package in packages])
    assert sorted(codes) == [0, 8, 8, 8]
    assert_whole(any_store, packages[codes.index(0)])
    assert not any(key.endswith((".claim", "?")) for key in keys(any_store))


def test_publishers_of_the_same_bytes_all_succeed(
    any_store: S3Store, bench: Bench, tmp_path: Path, in_children: Any
) -> None:
    package = sealed(bench, tmp_path / "package")
    assert in_children([child_job(any_store, package)] * 4) == [0, 0, 0, 0]
    assert_whole(any_store, package)
    assert not any(key.endswith((".claim", "?")) for key in keys(any_store))


def test_statement_is_added_once_and_other_bytes_are_a_conflict(
    any_store: S3Store, bench: Bench, tmp_path: Path
) -> None:
    package = sealed(bench, tmp_path / "package", size_bytes=10)
    place = place_of(package)
    with pytest.raises(NotFoundError, match="publish it first"):
        any_store.put_statement(place, "test-1", {"report.json": b"{}"})
    any_store.put_package(package, {})
    files = {"report.json": b"{}", "report.html": b"<html>\n"}
    assert any_store.put_statement(place, "test-1", files)
    assert not any_store.put_statement(place, "test-1", files)
    with pytest.raises(ConflictError, match="other bytes"):
        any_store.put_statement(place, "test-1", {**files, "report.json": b"{1}"})
    (found,) = any_store.statements(place)
    assert (found.name, found.sizes) == ("test-1", {"report.json": 2, "report.html": 7})
    assert any_store.read_statement(place, "test-1") == files
    with pytest.raises(NotFoundError, match="no statement other"):
        any_store.read_statement(place, "other")


def test_move_is_exclusive_and_channel_is_replaced(any_store: S3Store) -> None:
    any_store.put_move("tiny", "any-x", "stable.card.000001.dsse.json", b"one")
    for data in (b"one", b"two"):
        with pytest.raises(ConflictError, match="somebody else moved"):
            any_store.put_move("tiny", "any-x", "stable.card.000001.dsse.json", data)
    assert any_store.moves("tiny", "any-x") == {"stable.card.000001.dsse.json": b"one"}
    any_store.put_channel("tiny", "any-x", "stable.card.json", b"1")
    any_store.put_channel("tiny", "any-x", "stable.card.json", b"2")
    assert any_store.channels("tiny", "any-x") == {"stable.card.json": b"2"}
    assert any_store.channels("tiny", "any-y") == {}


def test_racing_moves_have_one_winner(any_store: S3Store, in_children: Any) -> None:
    file = "stable.card.000001.dsse.json"
    jobs = [partial(any_store.put_move, "tiny", "any-x", file, b"%d" % n) for n in range(8)]
    codes = in_children(jobs)
    assert sorted(codes) == [0] + [8] * 7
    assert any_store.moves("tiny", "any-x") == {file: b"%d" % codes.index(0)}


def test_forked_process_has_a_connection_of_its_own(store: S3Store, in_children: Any) -> None:
    bucket = store._bucket()

    def use() -> None:
        assert store.names() == []
        assert store._bucket() is not bucket

    assert in_children([use, use]) == [0, 0]
    assert store._bucket() is bucket


def test_removed_version_is_gone_with_all_its_objects(
    any_store: S3Store, bench: Bench, tmp_path: Path
) -> None:
    package = sealed(bench, tmp_path / "package")
    any_store.put_package(package, SIGNATURES)
    place = place_of(package)
    assert any_store.delete_version(place) > 11 << 20
    assert any_store.versions("tiny", place.variant) == []
    assert keys(any_store) == set()
    assert any_store.delete_version(place) == 0
    assert any_store.put_package(package, {})  # and may come back
    assert_whole(any_store, package)


def test_check_for_writing_leaves_no_trace(any_store: S3Store) -> None:
    any_store.check_writable()
    assert keys(any_store) == set()


def test_what_is_not_ours_is_ignored(any_store: S3Store, bench: Bench, tmp_path: Path) -> None:
    package = sealed(bench, tmp_path / "package", size_bytes=10)
    any_store.put_package(package, SIGNATURES)
    place = place_of(package)
    bucket = any_store._bucket()
    version = bucket.address.version(place)
    for key in (
        f"{bucket.address.root}UPPER/x/1.0/manifest.json",
        f"{bucket.address.root}tiny/Variant_/1.0/manifest.json",
        f"{bucket.address.variant('tiny', place.variant)}not-a-version/manifest.json",
        f"{bucket.address.variant('tiny', place.variant)}2.0/engine/model.plan",
        f"{version}.statements/stray.txt",
        f"{version}.statements/..statement",
        f"{bucket.address.channels('tiny', place.variant)}readme.txt",
    ):
        bucket.write(key, b"x")
    bucket.write(f"{bucket.address.channels('tiny', place.variant)}huge.json", b"x" * 70_000)
    assert any_store.names() == ["tiny"]
    assert any_store.variants("tiny") == [place.variant]
    assert any_store.versions("tiny", place.variant) == [place.version]
    assert [found.name for found in any_store.statements(place)] == ["build-1"]
    assert any_store.channels("tiny", place.variant) == {}


def test_missing_things_are_not_found(any_store: S3Store, bench: Bench, tmp_path: Path) -> None:
    place = Place(name="tiny", variant="any-x", version="1.0")
    with pytest.raises(NotFoundError, match=r"has no tiny/any-x:1\.0"):
        any_store.read_manifest(place)
    (file, *_) = files_of(sealed(bench, tmp_path / "package", size_bytes=10).manifest)
    with pytest.raises(NotFoundError, match="engine/"):
        read_file(any_store, place, file)
    assert any_store.statements(place) == []
    assert any_store.moves("tiny", "any-x") == {}


def test_missing_bucket_is_named(any_store: S3Store) -> None:
    other = S3Store(url="s3://no-such-bucket/x", endpoint_url=any_store.endpoint_url)
    with pytest.raises(NotFoundError, match="no bucket no-such-bucket"):
        other.names()


def test_oversized_manifest_is_refused_by_its_size(any_store: S3Store) -> None:
    place = Place(name="tiny", variant="any-x", version="1.0")
    bucket = any_store._bucket()
    bucket.write(bucket.address.manifest(place), b" " * (MAX_MANIFEST_BYTES + 1))
    with pytest.raises(CorruptError, match="longer than"):
        any_store.read_manifest(place)


def test_server_without_checksums_is_served_without_them(
    any_store: S3Store, bench: Bench, tmp_path: Path
) -> None:
    package = sealed(bench, tmp_path / "package")
    store = S3Store(
        url=any_store.url,
        endpoint_url=any_store.endpoint_url,
        request_checksum_calculation="when_required",
        part_bytes=5 << 20,
    )
    assert store.put_package(package, SIGNATURES)
    assert_whole(store, package)


def test_missing_credentials_name_the_variables(
    any_store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    store = S3Store(url=any_store.url, endpoint_url=any_store.endpoint_url)
    with pytest.raises(AccessError, match="AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        store.names()


@pytest.mark.services
@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_refused_and_stay_secret(
    s3: Any, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    store = s3()
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    monkeypatch.setenv(variable, "wrong-" + secret)
    with pytest.raises(AccessError) as caught:
        store.check_writable()
    assert secret not in str(caught.value)
    assert "AWS_ACCESS_KEY_ID" in str(caught.value)


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        ("https://bucket/x", "not an S3 registry"),
        ("s3://", "not a bucket's name"),
        ("s3://Bucket/x", "not a bucket's name"),
        ("s3://key:secret@bucket/x", "no credentials"),
        ("s3://bucket/a/../b", "may not be in a prefix"),
        ("s3://bucket/a//b", "may not be in a prefix"),
        ("s3://bucket/a?x=1", "not an S3 registry"),
    ],
)
def test_url_that_names_no_bucket_is_a_fault_of_the_command_line(url: str, fault: str) -> None:
    with pytest.raises(RecipeError, match=fault) as caught:
        S3Store(url=url)
    assert "secret" not in str(caught.value)


def test_whole_bucket_can_be_a_registry(store: S3Store) -> None:
    whole = S3Store(url="s3://bucket")
    whole.put_channel("tiny", "any-x", "stable.card.json", json.dumps({}).encode())
    assert whole.names() == ["tiny"]
    assert whole.channels("tiny", "any-x") == {"stable.card.json": b"{}"}


def test_importing_the_store_and_making_one_imports_no_boto3() -> None:
    script = (
        "import sys\n"
        "from pipeline.registry.stores.s3 import S3Store\n"
        "S3Store(url='s3://bucket/x')\n"
        "print(sorted({'boto3', 'botocore', 'urllib3', 'rich'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(pipeline.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"
