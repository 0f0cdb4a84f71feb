"""Every way in which bytes can suffer between a store and the disk."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import AccessError, CorruptError, TransientError
from pipeline.registry.client.layout import verify_layout
from tests.registry.client.conftest import PIECE_BYTES, QUICK, Shop, noise
from tests.registry.client.faulty_store import (
    Fault,
    FaultyStore,
    flipped,
    refused,
    reset_after,
    short_after,
    too_long,
)


@pytest.mark.parametrize(
    ("fault", "reached"),
    [(reset_after(700), 700), (short_after(700), 700), (short_after(0), 0), (refused, 0)],
    ids=["reset", "short", "empty", "stalled"],
)
def test_a_broken_answer_is_resumed_from_the_byte_that_it_reached(
    shop: Shop, fault: Fault, reached: int
) -> None:
    reference = shop.publish(shop.engine(files={"model.plan": noise(3 * PIECE_BYTES)}))
    store = FaultyStore(store=shop.store, faults=[fault, fault])
    pulled = shop.pull(store=store, jobs=1)
    assert verify_layout(shop.to).digest == reference.digest
    assert pulled.fetched_bytes == pulled.size_bytes
    assert [offset for _, offset in store.opened][:3] == [0, reached, 2 * reached]


def test_a_piece_asks_for_no_byte_of_the_next_and_the_last_for_all_that_there_is(
    shop: Shop,
) -> None:
    shop.publish(shop.engine(files={"model.plan": noise(2 * PIECE_BYTES + 1)}))
    store = FaultyStore(store=shop.store)
    shop.pull(store=store, jobs=1)
    asked = zip(store.opened, store.ends, strict=True)
    large = [(start, end) for (path, start), end in asked if path.endswith("model.plan")]
    assert large == [(0, PIECE_BYTES), (PIECE_BYTES, 2 * PIECE_BYTES), (2 * PIECE_BYTES, None)]


def test_retries_end_and_what_has_landed_is_kept_for_the_next_run(shop: Shop) -> None:
    shop.publish()
    good = 3
    store = FaultyStore(
        store=shop.store, faults=[lambda chunks, file, offset: chunks] * good, always=refused
    )
    with pytest.raises(TransientError, match="stalled"):
        shop.pull(store=store, jobs=1)
    assert len(store.opened) == good + QUICK.tries
    assert not shop.to.exists()
    again = shop.pull(store=FaultyStore(store=shop.store), jobs=1)
    assert again.size_bytes - 3 * PIECE_BYTES <= again.fetched_bytes < again.size_bytes
    assert shop.left() == ["tiny"]


def test_an_endless_row_of_tiny_progress_ends_too(shop: Shop) -> None:
    shop.publish()
    store = FaultyStore(store=shop.store, always=reset_after(1))
    with pytest.raises(TransientError, match="reset"):
        shop.pull(store=store, jobs=1)
    assert len(store.opened) <= 4 * QUICK.tries_of_piece


def test_small_requests_are_tried_again_too(shop: Shop) -> None:
    reference = shop.publish()
    store = FaultyStore(store=shop.store, small_faults=2)
    assert shop.pull(store=store).digest == reference.digest
    with pytest.raises(TransientError):
        shop.pull(store=FaultyStore(store=shop.store, small_faults=3), to=shop.home / "b")


def test_a_byte_that_was_hurt_on_its_way_is_fetched_once_more(shop: Shop) -> None:
    reference = shop.publish()
    store = FaultyStore(store=shop.store, faults=[flipped])
    pulled = shop.pull(store=store, jobs=1)  # in order, so that it is not the empty file's
    assert verify_layout(shop.to).digest == reference.digest
    assert pulled.fetched_bytes > pulled.size_bytes


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
    assert [path.name for path in packages.glob("*") if "statements" not in path.name] == []
    # No endless loop: each file was fetched twice at most.
    assert store.sent_bytes < 3 * 40_000


def test_a_file_that_goes_on_is_left_at_the_first_byte_too_many(shop: Shop) -> None:
    shop.publish()
    store = FaultyStore(store=shop.store, always=too_long)
    with pytest.raises(CorruptError, match="longer than"):
        shop.pull(store=store, jobs=1)
    assert store.sent_bytes < 100_000  # of a million
    assert shop.left() == []


def test_access_that_is_refused_is_not_tried_again(shop: Shop) -> None:
    shop.publish()

    def forbidden(chunks: Any, file: Any, offset: int) -> Any:
        raise AccessError("403: no permission")
        yield b""

    store = FaultyStore(store=shop.store, always=forbidden)
    with pytest.raises(AccessError):
        shop.pull(store=store, jobs=1)
    assert len(store.opened) == 1
    assert shop.left() == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_fault_of_our_disk_is_clean_and_leaves_nothing(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    shop.publish()
    real, calls = os.pwrite, 0

    def pwrite(*arguments: Any) -> int:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise OSError(code, os.strerror(code))
        return real(*arguments)

    monkeypatch.setattr(os, "pwrite", pwrite)
    store = FaultyStore(store=shop.store)
    wanted = TransientError if code in {errno.ENOSPC, errno.EDQUOT} else Exception
    with pytest.raises(wanted, match=os.strerror(code)):
        shop.pull(store=store, jobs=1)
    assert shop.left() == []
    assert len(store.opened) <= 5  # our disk's fault is not the store's: no retry


def test_a_full_disk_leaves_the_old_copy_in_the_cache_intact(
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
    assert (again.came, again.digest) == ("cache", reference.digest)


def test_a_dead_runs_pieces_are_verified_before_they_are_kept(shop: Shop) -> None:
    engine = shop.engine(files={"model.plan": noise(6 * PIECE_BYTES)})
    reference = shop.publish(engine)
    good = [lambda chunks, file, offset: chunks] * 4
    with pytest.raises(TransientError):
        shop.pull(store=FaultyStore(store=shop.store, faults=[*good], always=refused), jobs=1)
    (partial,) = shop.to.parent.glob(".tiny.pulling-*")
    plan = partial / "package" / "engine" / "model.plan"
    data = bytearray(plan.read_bytes())
    data[PIECE_BYTES + 5] ^= 1
    plan.write_bytes(data)
    (partial / "package" / "engine" / "evil").write_text("not of the package")
    store = FaultyStore(store=shop.store)
    pulled = shop.pull(store=store, jobs=1)
    assert pulled.fetched_bytes == 3 * PIECE_BYTES  # the damaged one and the two that were missing
    assert verify_layout(shop.to).digest == reference.digest


def test_a_torn_journal_costs_a_piece_and_no_more(shop: Shop) -> None:
    engine = shop.engine(files={"model.plan": noise(6 * PIECE_BYTES)})
    reference = shop.publish(engine)
    good = [lambda chunks, file, offset: chunks] * 4
    with pytest.raises(TransientError):
        shop.pull(store=FaultyStore(store=shop.store, faults=[*good], always=refused), jobs=1)
    (partial,) = shop.to.parent.glob(".tiny.pulling-*")
    journal = partial / "journal"
    journal.write_bytes(journal.read_bytes()[:-5])
    pulled = shop.pull(jobs=1)
    assert pulled.fetched_bytes == 3 * PIECE_BYTES
    assert verify_layout(shop.to).digest == reference.digest


def test_the_journal_of_other_bytes_is_worth_nothing(shop: Shop) -> None:
    engine = shop.engine(files={"model.plan": noise(6 * PIECE_BYTES)})
    shop.publish(engine)
    good = [lambda chunks, file, offset: chunks] * 4
    with pytest.raises(TransientError):
        shop.pull(store=FaultyStore(store=shop.store, faults=[*good], always=refused), jobs=1)
    (partial,) = shop.to.parent.glob(".tiny.pulling-*")
    journal = partial / "journal"
    journal.write_text(journal.read_text().replace(" 4096", " 8192", 1))
    pulled = shop.pull(jobs=1)
    assert pulled.fetched_bytes == pulled.size_bytes


def test_pieces_that_lie_in_any_order_give_the_right_hash(shop: Shop) -> None:
    engine = shop.engine(files={f"shard-{n}": noise(37 * PIECE_BYTES + n, n) for n in range(3)})
    reference = shop.publish(engine)
    for jobs in (1, 2, 16):
        to = shop.home / f"jobs-{jobs}"
        assert shop.pull(jobs=jobs, to=to).digest == reference.digest
        assert verify_layout(to).digest == reference.digest


def test_many_small_files_do_not_use_up_file_descriptors(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    files = {f"f{number:04}": b"%d" % number for number in range(400)}
    reference = shop.publish(shop.engine(files=files))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (150, hard))
    try:
        pulled = shop.pull(jobs=8)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert pulled.digest == reference.digest


def test_ctrl_c_keeps_what_has_landed(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.publish()

    def interrupted(self: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.registry.client.owned.Owned.touch", interrupted)
    slow = FaultyStore(store=shop.store, always=_slow)
    with pytest.raises(KeyboardInterrupt):
        shop.pull(store=slow, jobs=1)
    monkeypatch.undo()
    assert not shop.to.exists()
    assert len(list(shop.to.parent.glob(".tiny.pulling-*"))) == 1
    shutil.rmtree(shop.to.parent)


def _slow(chunks: Any, file: Any, offset: int) -> Any:
    import time

    for chunk in chunks:
        for start in range(0, len(chunk), 256):
            time.sleep(0.05)
            yield chunk[start : start + 256]
