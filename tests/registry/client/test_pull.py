"""The straight line of a pull."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from pipeline.core.errors import (
    AccessError,
    ConflictError,
    CorruptError,
    IncompatibleError,
    NotFoundError,
    RecipeError,
    TransientError,
    UntrustedError,
)
from pipeline.registry.client.deliver import cache_dir, verify_layout
from pipeline.registry.client.pull import run
from pipeline.registry.store import Place
from pipeline.registry.trust.signing import write_key_pair
from tests.registry.client.conftest import CHUNK_BYTES, Shop, engine_files, noise
from tests.registry.client.faulty_store import FaultyStore
from tests.registry.packages import read_files
from tests.registry.team import CARD, OTHER_CARD


@pytest.mark.parametrize("through_cache", [True, False])
def test_a_pulled_folder_has_the_published_bytes_and_verifies(
    shop: Shop, through_cache: bool
) -> None:
    files = {"model.plan": noise(5 * CHUNK_BYTES + 1), "a/ä 100%.json": b"{}", "empty": b""}
    reference = shop.publish(files)
    pulled = shop.pull(through_cache=through_cache)
    assert (pulled.digest, str(pulled.resolved.place)) == (reference.digest, str(reference))
    assert (pulled.chosen.proof.kind, pulled.origin) == ("proven", "registry")
    assert engine_files(shop.to) == files
    assert verify_layout(shop.to).digest == reference.digest
    assert shop.left() == ["tiny"]
    assert pulled.fetched_bytes == pulled.resolved.package.size_bytes


def test_the_pulled_folder_has_statements_and_a_receipt_and_is_read_only(shop: Shop) -> None:
    shop.publish()
    policy = shop.policy()
    old = os.umask(0)
    try:
        flags = {"runtime": "tensorrt-rtx==1.7.1.116", "vram": "20GiB"}
        shop.pull(flags=flags, policy=policy)
    finally:
        os.umask(old)
    assert list((shop.to / "statements").glob("signature-*/statement.dsse.json"))
    assert list((shop.to / "statements").glob("test-*/statement.dsse.json"))
    receipt = json.loads((shop.to / "pull.json").read_text())
    assert receipt["facts"]["vram_bytes"] == {"value": 20 << 30, "origin": "given"}
    assert receipt["facts"]["sm"] == {"value": 89, "origin": "known of the card"}
    assert receipt["facts"]["driver"] is None
    assert receipt["unproven_accepted"] is False
    assert receipt["signer"]["name"] == "builder"
    for path in (shop.to, *shop.to.rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o555 if path.is_dir() else 0o444)
        assert path.is_dir() or path.stat().st_nlink == 1


def test_the_model_signature_that_was_signed_lies_in_the_engine_folder(shop: Shop) -> None:
    pytest.importorskip("model_signing")
    reference = shop.publish()
    shop.pull()
    (files,) = [
        read_files(shop.store, Place.of(reference), one.name)
        for one in shop.store.read_statements(Place.of(reference))
        if one.kind == "signature"
    ]
    assert (shop.to / "engine" / "model.sig").read_bytes() == files["model.sig"]


def test_an_empty_folder_is_filled_and_pulling_again_to_it_succeeds_at_once(shop: Shop) -> None:
    shop.publish()
    shop.to.mkdir(parents=True)
    shop.pull()
    before = (shop.to / "pull.json").stat()
    again = shop.pull()
    assert (again.origin, again.fetched_bytes) == ("present", 0)
    assert (shop.to / "pull.json").stat() == before


@pytest.mark.parametrize("taken", ["a file", "another file in it", "another package"])
def test_what_else_is_at_the_goal_stays_untouched(shop: Shop, taken: str) -> None:
    shop.publish()
    if taken == "another package":
        other = shop.publish({"model.plan": b"2"}, recipe_version="2.0", verdict=None)
        shop.pull(f"tiny:{other.version}", accept_unproven=True)
    elif taken == "a file":
        shop.to.parent.mkdir()
        shop.to.write_text("mine")
    else:
        shop.to.mkdir(parents=True)
        (shop.to / "mine").write_text("mine")
    before = sorted((path, path.stat().st_mtime_ns) for path in shop.to.parent.rglob("*"))
    with pytest.raises(ConflictError):
        shop.pull()
    assert before == sorted((path, path.stat().st_mtime_ns) for path in shop.to.parent.rglob("*"))


def test_a_damaged_folder_at_the_goal_is_corrupt_not_success(shop: Shop) -> None:
    shop.publish()
    shop.pull()
    plan = shop.to / "engine" / "model.plan"
    plan.chmod(0o644)
    plan.write_bytes(bytes([plan.read_bytes()[0] ^ 1]) + plan.read_bytes()[1:])
    plan.chmod(0o444)
    with pytest.raises(CorruptError, match=r"model\.plan"):
        shop.pull()


def test_a_goal_below_a_folder_that_others_write_is_refused_unless_allowed(shop: Shop) -> None:
    shop.publish()
    shop.to.parent.mkdir()
    shop.to.parent.chmod(0o777)
    with pytest.raises(AccessError, match=r"writable by everyone.*--allow-shared-parent"):
        shop.pull()
    assert shop.left() == []
    assert shop.pull(allow_shared_parent=True).origin == "registry"


def test_a_card_without_a_verdict_exits_6_and_names_those_that_have_one(shop: Shop) -> None:
    shop.publish()
    with pytest.raises(IncompatibleError, match=f"never run on {OTHER_CARD}.*proven on {CARD}"):
        shop.pull(flags={"gpu": "l4"})
    assert shop.left() == []
    taken = shop.pull(flags={"gpu": "l4"}, accept_unproven=True)
    assert (taken.chosen.proof.kind, taken.chosen.proof.verdict) == ("unproven", None)
    assert json.loads((shop.to / "pull.json").read_text())["unproven_accepted"] is True


def test_unsigned_is_taken_only_when_asked_for_and_recorded(shop: Shop) -> None:
    reference = shop.publish(signed=False)
    with pytest.raises(UntrustedError, match="no trusted key signed it"):
        shop.pull()
    assert shop.left() == []
    assert shop.pull(allow_unsigned=True).digest == reference.digest
    assert json.loads((shop.to / "pull.json").read_text())["unsigned_allowed"] is True


def test_a_yanked_package_is_refused_unless_named_by_digest_with_the_flag(shop: Shop) -> None:
    reference = shop.publish()
    by_digest = f"tiny@sha256:{reference.digest}"
    shop.yank(reference)
    store = FaultyStore(store=shop.store)
    for text in ("tiny", f"tiny:{reference.version}", by_digest):
        with pytest.raises(UntrustedError, match=r"was yanked by ada .*it is slow.*--allow-yanked"):
            shop.pull(text, store=store)
    assert store.opened == []
    assert shop.left() == []
    with pytest.raises(RecipeError, match="--allow-yanked"):
        shop.pull("tiny", allow_yanked=True)
    assert shop.pull(by_digest, allow_yanked=True).digest == reference.digest
    receipt = json.loads((shop.to / "pull.json").read_text())
    assert receipt["yanked_accepted"].endswith(": it is slow")
    shop.yank(reference, undo=True)
    assert shop.pull(to=shop.home / "3").digest == reference.digest


def test_a_full_disk_is_found_out_before_the_first_byte(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.publish()
    usage = shutil.disk_usage(shop.home)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=100))
    store = FaultyStore(store=shop.store)
    with pytest.raises(TransientError, match="disk full"):
        shop.pull(store=store)
    assert (shop.left(), store.opened) == ([], [])


def test_the_cache_is_a_registry_for_who_has_no_network(shop: Shop) -> None:
    reference = shop.publish()
    shop.pull(through_cache=True)
    by_digest, cache = f"tiny@sha256:{reference.digest}", str(cache_dir())
    again = run(shop.request(by_digest, to=shop.home / "again", registry=cache))
    assert (again.origin, again.fetched_bytes, again.chosen.proof.kind) == ("cache", 0, "proven")
    assert engine_files(shop.home / "again") == engine_files(shop.to)
    shop.yank(reference)
    shop.pull(by_digest, to=shop.home / "2", through_cache=True, allow_yanked=True)
    with pytest.raises(UntrustedError, match="yanked"):
        run(shop.request(by_digest, to=shop.home / "3", registry=cache))


def test_a_local_key_counts_for_a_folder_of_this_machine_only(shop: Shop) -> None:
    reference = shop.publish()
    write_key_pair(shop.key, shop.home / "config" / "local.key")
    environ = {"ENGINESMITH_CONFIG": str(shop.home / "config")}
    assert shop.pull(policy=None, environ=environ).digest == reference.digest
    elsewhere = FaultyStore(store=shop.store, local=False)
    with pytest.raises(NotFoundError, match="no trusted move"):
        shop.pull(store=elsewhere, policy=None, environ=environ, to=shop.home / "other")
    with pytest.raises(UntrustedError, match="no trusted key signed it"):
        shop.pull(f"tiny:{reference.version}", store=elsewhere, policy=None, environ=environ)
