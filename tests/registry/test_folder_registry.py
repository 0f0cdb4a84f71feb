from __future__ import annotations

import dataclasses
import errno
import logging
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from pipeline.core.errors import (
    AccessError,
    ConflictError,
    CorruptError,
    PipelineError,
    TransientError,
)
from pipeline.registry.backend import Registry
from pipeline.registry.stores.folder import FolderRegistry
from pipeline.registry.package import verify

Bench = Any
InChildren = Callable[[Sequence[Callable[[], object]]], list[int]]

_CONF = Path(__file__).parents[2] / "conf" / "registry" / "folder.yaml"


def _tree(root: Path) -> dict[str, bytes]:
    """Every visible file, and what is left in the private ones."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and ".locks" not in path.parts
    }


def test_configuration_gives_a_registry() -> None:
    registry: Registry = instantiate(OmegaConf.load(_CONF), _convert_="all")
    assert registry == FolderRegistry(path=Path("artifacts"))


def test_published_package_lies_where_the_layout_says(bench: Bench) -> None:
    reference = bench.publish()
    root = bench.registry.path
    assert str(reference) == "tiny/sm89-trtrtx-fp8-b8:1.0-bbbbbbbbbbbb"
    assert sorted(_tree(root)) == [
        "tiny/sm89-trtrtx-fp8-b8/1.0-bbbbbbbbbbbb/engine/model.plan",
        "tiny/sm89-trtrtx-fp8-b8/1.0-bbbbbbbbbbbb/engine/tokenizer/tokenizer.json",
        "tiny/sm89-trtrtx-fp8-b8/1.0-bbbbbbbbbbbb/manifest.json",
    ]
    assert verify(bench.registry.location(reference)).digest == reference.digest
    assert list((root / ".staging").iterdir()) == []


def test_published_files_are_read_only_and_yet_can_be_removed(bench: Bench) -> None:
    folder = bench.registry.location(bench.publish())
    assert not any(path.stat().st_mode & 0o222 for path in folder.rglob("*") if path.is_file())
    assert all(path.stat().st_mode & 0o200 for path in folder.rglob("*") if path.is_dir())
    subprocess.run(["rm", "-rf", str(bench.registry.path)], check=True)
    assert not bench.registry.path.exists()


def test_publishing_the_same_digest_again_succeeds(bench: Bench) -> None:
    first = bench.publish()
    before = _tree(bench.registry.path)
    assert bench.publish() == first
    assert _tree(bench.registry.path) == before


def test_publish_refuses_other_bytes_under_an_existing_version(bench: Bench) -> None:
    first = bench.publish()
    before = _tree(bench.registry.path)
    with pytest.raises(ConflictError, match=r"other bytes.*--rebuild") as raised:
        bench.publish(bench.engine(plan=b"other"))
    assert raised.value.exit_code == 8
    assert _tree(bench.registry.path) == before
    assert bench.registry.resolve(str(first)).digest == first.digest


@pytest.mark.parametrize("kind", ["file", "symlink", "dangling symlink", "foreign folder"])
def test_publish_never_replaces_what_is_there(bench: Bench, tmp_path: Path, kind: str) -> None:
    reference = bench.publish()
    target = bench.registry.location(reference)
    shutil.move(target, tmp_path / "elsewhere")
    if kind == "file":
        target.write_text("mine")
    elif kind == "symlink":
        target.symlink_to(tmp_path / "elsewhere")
    elif kind == "dangling symlink":
        target.symlink_to(tmp_path / "nothing")
    else:
        target.mkdir()
        (target / "mine").write_text("mine")
    before = os.lstat(target).st_ino
    with pytest.raises(ConflictError, match="damaged package"):
        bench.publish()
    assert os.lstat(target).st_ino == before


def test_package_changed_after_sealing_is_not_published(bench: Bench) -> None:
    with bench.registry.staging() as staging:
        package = bench.seal(staging)
        (package.engine_dir / "model.plan").write_bytes(b"x" * 400)
        with pytest.raises(CorruptError, match="SHA-256"):
            bench.registry.publish(package)
    assert bench.registry.entries() == []


def test_package_sealed_anew_is_not_published_as_the_old_one(bench: Bench) -> None:
    with bench.registry.staging() as staging:
        package = bench.seal(staging)
        shutil.rmtree(package.engine_dir)
        (staging / "manifest.json").unlink()
        bench.seal(staging, bench.engine(plan=b"other"))
        with pytest.raises(CorruptError, match="changed since it was sealed"):
            bench.registry.publish(package)
    assert bench.registry.entries() == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_staging_folder_is_gone_after_any_exception(
    bench: Bench, error: type[BaseException]
) -> None:
    def fail() -> None:
        with bench.registry.staging() as staging:
            (staging / "half").write_text("x")
            raise error

    with pytest.raises(error):
        fail()
    assert list((bench.registry.path / ".staging").iterdir()) == []


def test_leftover_of_a_dead_process_is_swept_and_that_of_a_live_one_kept(
    bench: Bench, in_children: InChildren
) -> None:
    def die_in_staging() -> None:
        with bench.registry.staging() as staging:
            (staging / "half").write_text("x")
            os.kill(os.getpid(), 9)

    assert in_children([die_in_staging]) == [-9]
    area = bench.registry.path / ".staging"
    assert len(list(area.iterdir())) == 1
    with bench.registry.staging() as mine, bench.registry.staging() as other:
        assert sorted(area.iterdir()) == sorted([mine, other])


@pytest.mark.parametrize("name", ["0123456789ab-1-00000000", "0123456789ab-x", "unknown", "a-²"])
def test_leftover_of_another_machine_is_swept_after_a_day(bench: Bench, name: str) -> None:
    leftover = bench.registry.path / ".staging" / name
    leftover.mkdir(parents=True)
    with bench.registry.staging():
        assert leftover.exists()
    day_ago_s = time.time() - 24 * 3600 - 60
    os.utime(leftover, (day_ago_s, day_ago_s))
    with bench.registry.staging():
        assert not leftover.exists()


def test_find_takes_the_newest_rebuild_that_is_whole(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    registry, key = bench.registry, "b" * 64
    assert list(registry.find("tiny", "sm89-trtrtx-fp8-b8", key)) == []
    first = bench.publish()
    second = bench.publish(bench.engine(plan=b"again"), _rebuilt(bench))
    third = bench.publish(bench.engine(plan=b"and again"), _rebuilt(bench))
    assert (second.version, third.version) == (f"{first.version}.r2", f"{first.version}.r3")
    found = registry.find("tiny", "sm89-trtrtx-fp8-b8", key)
    assert [package.digest for package in found] == [third.digest, second.digest, first.digest]

    plan = registry.location(third) / "engine" / "model.plan"
    plan.chmod(0o644)
    plan.write_bytes(b"AND AGAIN")
    with caplog.at_level(logging.WARNING):
        found = next(registry.find("tiny", "sm89-trtrtx-fp8-b8", key))
    assert found.digest == second.digest
    assert "'engine/model.plan' has SHA-256" in caplog.text
    assert "To put the damaged one aside: mv " in caplog.text


def _rebuilt(bench: Bench) -> Any:
    version = bench.registry.next_version("tiny", "sm89-trtrtx-fp8-b8", "1.0-bbbbbbbbbbbb")
    return dataclasses.replace(bench.label(), version=version)


def test_find_ignores_other_builds_and_their_damage(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    other = bench.publish(label=bench.label(build_key="c" * 64))
    (bench.registry.location(other) / "manifest.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert not list(bench.registry.find("tiny", "sm89-trtrtx-fp8-b8", "b" * 64))
    assert caplog.text == ""


def test_damaged_package_keeps_its_version_and_the_build_gets_the_next(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    first = bench.publish()
    manifest = bench.registry.location(first) / "manifest.json"
    manifest.chmod(0o644)
    manifest.write_text("{}")
    with caplog.at_level(logging.WARNING):
        assert not list(bench.registry.find("tiny", "sm89-trtrtx-fp8-b8", "b" * 64))
    assert "manifest.json has schema None" in caplog.text
    with pytest.raises(ConflictError, match="taken by a damaged package"):
        bench.publish()
    second = bench.publish(label=_rebuilt(bench))
    assert second.version == f"{first.version}.r2"
    (found,) = bench.registry.find("tiny", "sm89-trtrtx-fp8-b8", "b" * 64)
    assert found.digest == second.digest
    assert manifest.read_text() == "{}"


def test_next_version_of_a_rebuild_counts_on(bench: Bench) -> None:
    registry = bench.registry
    assert registry.next_version("tiny", "v", "1.0-abc") == "1.0-abc"
    (registry.path / "tiny" / "v" / "1.0-abc").mkdir(parents=True)
    assert registry.next_version("tiny", "v", "1.0-abc") == "1.0-abc.r2"
    (registry.path / "tiny" / "v" / "1.0-abc.r2").mkdir()
    assert registry.next_version("tiny", "v", "1.0-abc.r2") == "1.0-abc.r3"


def test_package_under_a_foreign_path_is_corrupt(bench: Bench) -> None:
    reference = bench.publish()
    folder = bench.registry.location(reference)
    folder.rename(folder.with_name("2.0-bbbbbbbbbbbb"))
    with pytest.raises(CorruptError, match="not what its path says"):
        bench.registry.resolve("tiny:2.0-bbbbbbbbbbbb")


def test_check_writable_leaves_no_trace(bench: Bench) -> None:
    bench.registry.check_writable()
    assert not bench.registry.path.exists()
    bench.publish()
    before = sorted(bench.registry.path.rglob("*"))
    bench.registry.check_writable()
    assert sorted(bench.registry.path.rglob("*")) == before


def test_root_that_is_a_file_is_an_access_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(AccessError, match=r"is not a folder; .*registry\.path=") as raised:
            FolderRegistry(path=path).check_writable()
        assert raised.value.exit_code == 1


def test_root_without_permission_is_an_access_fault(
    tmp_path: Path, in_children: InChildren
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o555)

    def check() -> None:
        os.chdir(closed)
        if os.geteuid() == 0:
            os.setuid(65534)  # root may write everywhere
        for path in ("artifacts", "."):
            with pytest.raises(AccessError, match=r"registry\.path="):
                FolderRegistry(path=Path(path)).check_writable()

    assert in_children([check]) == [0]


@pytest.mark.parametrize("call", ["fsync", "mkdir", "rename", "chmod"])
@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.ENOSPC, TransientError),
        (errno.EDQUOT, TransientError),
        (errno.EMFILE, TransientError),
        (errno.EROFS, AccessError),
        (errno.EACCES, AccessError),
        (errno.EIO, PipelineError),
    ],
)
def test_disk_fault_is_a_clean_error_and_leaves_nothing(
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    number: int,
    error: type[PipelineError],
) -> None:
    kept = bench.publish()
    before = _tree(bench.registry.path)

    def fail(path: Any, *args: Any, **kwargs: Any) -> None:
        raise OSError(number, os.strerror(number), str(path))

    with bench.registry.staging() as staging:
        package = bench.seal(staging, label=bench.label("2.0"), engine=bench.engine(variant="new"))
        with monkeypatch.context() as patched:
            patched.setattr(os, call, fail)
            with pytest.raises(PipelineError) as raised:
                bench.registry.publish(package)
    assert type(raised.value) is error
    assert os.strerror(number) in str(raised.value)
    assert _tree(bench.registry.path) == before
    assert bench.registry.resolve(str(kept)).digest == kept.digest


def test_damaged_package_is_listed_with_its_fault(bench: Bench) -> None:
    whole = bench.publish()
    bench.accept(whole)
    damaged = bench.publish(label=bench.label("2.0"))
    (bench.registry.location(damaged) / "engine" / "model.plan").unlink()
    (bench.registry.path / "notes.txt").write_text("not ours")
    (bench.registry.path / "tiny" / "Upper").mkdir()
    entries = {entry.version: entry for entry in bench.registry.entries()}
    assert entries.keys() == {whole.version, damaged.version}
    assert entries[whole.version].verdict == "checked"
    assert entries[whole.version].size_bytes == 402
    assert entries[damaged.version].manifest is None
    assert "'engine/model.plan' is missing" in entries[damaged.version].fault
