"""Every way in which bytes can suffer between a store and the disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import CorruptError, PipelineError, TransientError
from pipeline.registry.client.deliver import verify_layout
from pipeline.registry.client.download import RECORD
from tests.registry.client.conftest import CHUNK_BYTES, TRIES, Shop, noise
from tests.registry.client.faulty_store import (
    Fault,
    FaultyStore,
    flipped,
    good,
    refused,
    reset_after,
    short_after,
)


@pytest.mark.parametrize(
    ("fault", "reached"),
    [(reset_after(700), 700), (short_after(700), 700), (short_after(0), 0), (refused, 0)],
    ids=["reset", "short", "empty", "stalled"],
)
def test_a_broken_answer_is_resumed_from_the_byte_that_it_reached(
    shop: Shop, fault: Fault, reached: int
) -> None:
    reference = shop.publish({"model.plan": noise(3 * CHUNK_BYTES)})
    store = FaultyStore(store=shop.store, faults=[fault, fault])
    pulled = shop.pull(store=store, jobs=1)
    assert verify_layout(shop.to).digest == reference.digest
    assert pulled.fetched_bytes == pulled.resolved.package.size_bytes
    assert [offset for _, offset, _ in store.opened][:3] == [0, reached, 2 * reached]


def test_a_chunk_asks_for_no_byte_of_the_next(shop: Shop) -> None:
    shop.publish({"model.plan": noise(2 * CHUNK_BYTES + 1)})
    store = FaultyStore(store=shop.store)
    shop.pull(store=store, jobs=1)
    assert [(start, end) for path, start, end in store.opened if path.endswith("model.plan")] == [
        (0, CHUNK_BYTES),
        (CHUNK_BYTES, 2 * CHUNK_BYTES),
        (2 * CHUNK_BYTES, 2 * CHUNK_BYTES + 1),
    ]


def test_retries_end_and_what_has_landed_is_kept_for_the_next_run(shop: Shop) -> None:
    shop.publish()
    store = FaultyStore(store=shop.store, faults=[good] * 3, always=refused)
    with pytest.raises(TransientError, match="stalled"):
        shop.pull(store=store, jobs=1)
    assert len(store.opened) == 3 + TRIES
    assert not shop.to.exists()
    again = shop.pull(store=FaultyStore(store=shop.store), jobs=1)
    size_bytes = again.resolved.package.size_bytes
    assert size_bytes - 3 * CHUNK_BYTES <= again.fetched_bytes < size_bytes
    assert shop.left() == ["tiny"]


def test_a_byte_that_was_damaged_on_its_way_is_fetched_once_more(shop: Shop) -> None:
    reference = shop.publish()
    store = FaultyStore(store=shop.store, faults=[flipped])
    pulled = shop.pull(store=store, jobs=1)  # in order, so that it is not the empty file's
    assert verify_layout(shop.to).digest == reference.digest
    assert pulled.fetched_bytes > pulled.resolved.package.size_bytes


@pytest.mark.parametrize("through_cache", [True, False])
def test_bytes_that_stay_wrong_are_corrupt_and_nothing_is_left(
    shop: Shop, through_cache: bool
) -> None:
    shop.publish()
    store = FaultyStore(store=shop.store, always=flipped)
    with pytest.raises(CorruptError, match="SHA-256"):
        shop.pull(store=store, through_cache=through_cache)
    assert shop.left() == []
    packages = Path(os.environ["ENGINESMITH_CACHE"]) / "packages"
    assert not list(packages.rglob("manifest.json"))
    # No endless loop: each file was fetched twice at most.
    assert store.sent_bytes < 3 * 40_000


def test_a_file_that_stays_too_short_is_corrupt(shop: Shop) -> None:
    shop.publish()
    store = FaultyStore(store=shop.store, always=short_after(0))
    with pytest.raises(CorruptError, match="ends before byte"):
        shop.pull(store=store, jobs=1)
    assert shop.left() == []


_DISK_CALLS = ["pwrite", "fsync", "rename", "chmod"]


@pytest.mark.parametrize("call", _DISK_CALLS)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_fault_of_our_disk_is_clean_and_a_rerun_completes(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    reference = shop.publish()

    def fail(*arguments: Any, **more: Any) -> None:
        raise OSError(code, os.strerror(code))

    store = FaultyStore(store=shop.store)
    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail)
        with pytest.raises(PipelineError, match=os.strerror(code)) as caught:
            shop.pull(store=store, jobs=1)
    assert isinstance(caught.value, TransientError) == (code in {errno.ENOSPC, errno.EDQUOT})
    assert shop.left() == []
    assert len(store.opened) <= 10  # our disk's fault is not the store's: no retry
    assert shop.pull().digest == reference.digest
    assert shop.left() == ["tiny"]


def test_a_full_disk_leaves_the_copy_in_the_cache_intact(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = shop.publish()
    shop.pull(through_cache=True)

    def full(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "copy_file_range", full)
        with pytest.raises(TransientError, match="No space"):
            shop.pull(through_cache=True, to=shop.home / "second")
    assert not (shop.home / "second").exists()
    again = shop.pull(through_cache=True, to=shop.home / "second")
    assert (again.origin, again.digest) == ("cache", reference.digest)


def _interrupted(shop: Shop) -> Path:
    """The work folder of a pull that ended after 4 of 6 chunks."""
    shop.publish({"model.plan": noise(6 * CHUNK_BYTES)})
    store = FaultyStore(store=shop.store, faults=[good] * 4, always=refused)
    with pytest.raises(TransientError):
        shop.pull(store=store, jobs=1)
    (work,) = shop.to.parent.glob(".tiny.pulling-*")
    return work


def test_a_dead_runs_chunks_are_hashed_and_a_damaged_one_is_fetched_again(shop: Shop) -> None:
    work = _interrupted(shop)
    plan = work / "package" / "engine" / "model.plan"
    data = bytearray(plan.read_bytes())
    data[CHUNK_BYTES + 5] ^= 1
    plan.write_bytes(data)
    (work / "package" / "engine" / "evil").write_text("not of the package")
    (work / "package" / "link").symlink_to("/etc/hostname")
    pulled = shop.pull(jobs=1)
    assert pulled.fetched_bytes == 8 * CHUNK_BYTES  # the missing ones, then the whole file
    assert verify_layout(shop.to).digest == pulled.digest


@pytest.mark.parametrize(
    ("damage", "missing"),
    [
        (lambda data: data[:-1], 3),
        (lambda data: data + b"\x00?", 2),
        (lambda data: data.replace(b" 4096\n", b" 8192\n"), 6),
        (lambda data: b"", 6),
    ],
    ids=["torn", "garbled", "of other chunks", "empty"],
)
def test_a_damaged_record_costs_what_it_does_not_name_and_no_more(
    shop: Shop, damage: Any, missing: int
) -> None:
    record = _interrupted(shop) / RECORD
    record.write_bytes(damage(record.read_bytes()))
    pulled = shop.pull(jobs=1)
    assert pulled.fetched_bytes == missing * CHUNK_BYTES
    assert verify_layout(shop.to).digest == pulled.digest


def test_chunks_that_land_in_any_order_give_the_right_hash(shop: Shop) -> None:
    reference = shop.publish({f"shard-{n}": noise(37 * CHUNK_BYTES + n, n) for n in range(3)})
    for jobs in (1, 2, 16):
        to = shop.home / f"jobs-{jobs}"
        assert shop.pull(jobs=jobs, to=to).digest == reference.digest
        assert verify_layout(to).digest == reference.digest


def test_many_small_files_do_not_use_up_file_descriptors(shop: Shop) -> None:
    import resource

    reference = shop.publish({f"f{number:04}": b"%d" % number for number in range(400)})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (150, hard))
    try:
        pulled = shop.pull(jobs=8)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert pulled.digest == reference.digest
