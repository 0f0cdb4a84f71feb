"""The straight line, on every backend."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace

import pytest

from pipeline.core.errors import (
    ConflictError,
    CorruptError,
    IncompatibleError,
    NotFoundError,
    RecipeError,
    TransientError,
    UntrustedError,
)
from pipeline.registry import pull
from pipeline.registry.client.layout import verify_layout
from pipeline.registry.client.pull import run
from pipeline.registry.client.verify_only import verify_only
from pipeline.registry.signing.keys import generate_key, write_key_pair
from pipeline.registry.statements import Pointer
from tests.registry.backends import backends
from tests.registry.client.conftest import CARD, OTHER_CARD, Shop, engine_files
from tests.registry.client.faulty_store import FaultyStore

ShopOf = Callable[[str], Shop]


@pytest.mark.parametrize("backend", backends)
@pytest.mark.parametrize("through_cache", [True, False])
def test_a_pulled_folder_has_the_published_bytes_and_verifies(
    shop_of: ShopOf, backend: str, through_cache: bool
) -> None:
    shop = shop_of(backend)
    engine = shop.engine()
    reference = shop.publish(engine)
    pulled = shop.pull(through_cache=through_cache)
    assert pulled.digest == reference.digest
    assert pulled.reference == str(reference)
    assert (pulled.proven, pulled.verdict, pulled.came) == ("proven", "accepted", "registry")
    got = engine_files(shop.to)
    got.pop("model.sig", None)
    assert got == {
        path.relative_to(engine.dir).as_posix(): path.read_bytes()
        for path in engine.dir.rglob("*")
        if path.is_file()
    }
    assert verify_layout(shop.to).digest == reference.digest
    assert shop.left() == ["tiny"]
    assert pulled.fetched_bytes == pulled.size_bytes


def test_the_pulled_folder_has_signature_statements_and_receipt_and_is_read_only(
    shop: Shop,
) -> None:
    pytest.importorskip("model_signing")
    shop.publish()
    shop.pull(flags={"runtime": "tensorrt-rtx==1.7.1.116", "vram": "20GiB"})
    assert (shop.to / "engine" / "model.sig").is_file()
    assert list((shop.to / "statements").glob("build-*/manifest.dsse.json"))
    receipt = json.loads((shop.to / "pull.json").read_text())
    assert receipt["facts"]["vram_bytes"] == {"value": 20 << 30, "origin": "given"}
    assert receipt["facts"]["sm"] == {"value": 89, "origin": "known of the card"}
    assert receipt["facts"]["driver"] is None
    assert receipt["unproven_accepted"] is False
    assert receipt["signer"]["name"] == "release"
    for path in shop.to.rglob("*"):
        assert path.is_dir() or not path.stat().st_mode & 0o222
        assert path.is_dir() or path.stat().st_nlink == 1


def test_pulling_again_to_the_same_folder_succeeds_at_once(shop: Shop) -> None:
    shop.publish()
    shop.pull()
    before = (shop.to / "pull.json").stat()
    again = shop.pull()
    assert (again.came, again.fetched_bytes) == ("present", 0)
    assert (shop.to / "pull.json").stat() == before


def test_an_empty_folder_is_filled(shop: Shop) -> None:
    shop.publish()
    shop.to.mkdir(parents=True)
    assert shop.pull().came == "registry"


@pytest.mark.parametrize("taken", ["a file", "another file in it", "another package"])
def test_what_else_is_at_the_goal_stays_untouched(shop: Shop, taken: str) -> None:
    shop.publish()
    if taken == "another package":
        other = shop.publish(shop.engine(files={"model.plan": b"2"}), version="2.0", verdict=None)
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
    data = bytearray(plan.read_bytes())
    data[7] ^= 1
    plan.write_bytes(data)
    with pytest.raises(CorruptError, match=r"model\.plan"):
        shop.pull()


def test_a_card_without_a_verdict_exits_6_and_hears_which_cards_have_one(shop: Shop) -> None:
    shop.publish()
    with pytest.raises(IncompatibleError, match=f"no passing .* for {OTHER_CARD}.*{CARD}"):
        shop.pull(flags={"gpu": "l4"})
    assert shop.left() == []
    taken = shop.pull(flags={"gpu": "l4"}, accept_unproven=True)
    assert (taken.proven, taken.verdict) == ("unproven", None)
    assert json.loads((shop.to / "pull.json").read_text())["unproven_accepted"] is True


def test_a_verdict_that_is_added_later_proves_the_same_bytes_on_another_card(shop: Shop) -> None:
    reference = shop.publish()
    shop.judge(reference, card=OTHER_CARD)
    with pytest.raises(IncompatibleError, match="points to it for"):
        shop.pull(flags={"gpu": "l4"})  # stable of the L4 points nowhere
    shop.point(reference, OTHER_CARD)
    assert shop.pull(flags={"gpu": "l4"}).digest == reference.digest


def test_the_newest_verdict_of_a_card_decides(shop: Shop) -> None:
    reference = shop.publish()
    shop.judge(reference, "regression", name="zz-later")
    with pytest.raises(IncompatibleError, match="newest on this card is regression"):
        shop.pull()


def test_a_verdict_by_somebody_who_may_not_sign_proves_nothing(shop: Shop) -> None:
    reference = shop.publish(verdict=None)
    shop.judge(reference, key=generate_key())
    shop.point(reference)
    with pytest.raises(UntrustedError):
        shop.pull()


def test_unsigned_is_taken_only_when_asked_for_and_recorded(shop: Shop) -> None:
    reference = shop.publish(signed=False)
    with pytest.raises(UntrustedError, match="not signed"):
        shop.pull()
    assert shop.left() == []
    pulled = shop.pull(allow_unsigned=True)
    assert pulled.signer is None
    assert pulled.digest == reference.digest
    assert json.loads((shop.to / "pull.json").read_text())["unsigned_allowed"] is True


def test_a_revoked_package_is_refused_before_a_byte_moves(shop: Shop) -> None:
    reference = shop.publish()
    store = FaultyStore(store=shop.store)
    with pytest.raises(UntrustedError, match="revoked"):
        shop.pull(store=store, policy=shop.policy(revoked_digests=[reference.digest]))
    assert store.opened == []
    assert shop.left() == []


def test_a_yanked_package_is_refused_unless_named_by_digest_with_the_flag(shop: Shop) -> None:
    reference = shop.publish()
    by_digest = f"tiny@sha256:{reference.digest}"
    shop.yank(reference)
    store = FaultyStore(store=shop.store)
    for text in ("tiny", f"tiny:{reference.version}", by_digest):
        with pytest.raises(UntrustedError, match=r"was yanked by ada .*crashes.*--allow-yanked"):
            shop.pull(text, store=store)
    assert store.opened == []
    assert shop.left() == []
    with pytest.raises(RecipeError, match="--allow-yanked"):
        shop.pull("tiny", allow_yanked=True)
    pulled = shop.pull(by_digest, allow_yanked=True)
    assert pulled.digest == reference.digest
    told = json.loads((shop.to / "pull.json").read_text())
    assert told["yanked_accepted"].endswith(": crashes")
    assert any("YANKED by ada" in line for line in pulled.lines())
    with pytest.raises(UntrustedError, match="was yanked"):
        verify_only(shop.to, shop.request())
    assert verify_only(shop.to, shop.request(by_digest, allow_yanked=True)).yanked


def test_a_yank_that_is_undone_or_by_a_stranger_stops_nobody(shop: Shop) -> None:
    reference = shop.publish()
    shop.yank(reference, key=generate_key())
    assert shop.pull(to=shop.home / "1").yanked == ""
    shop.yank(reference)
    with pytest.raises(UntrustedError):
        shop.pull(to=shop.home / "2")
    shop.yank(reference, undo=True)
    assert shop.pull(to=shop.home / "3").digest == reference.digest


def test_an_unsigned_pointer_is_not_followed(shop: Shop) -> None:
    reference = shop.publish(verdict=None)
    shop.judge(reference)
    pointer = Pointer(channel="stable", card=CARD, reference=reference, seq=1)
    shop.store.put_channel("tiny", reference.variant, pointer.file, pointer.to_bytes())
    with pytest.raises(NotFoundError):
        shop.pull()
    assert shop.left() == []
    shop.point(reference)
    assert shop.pull().digest == reference.digest


def test_a_channel_that_somebody_else_moved_is_refused(shop: Shop) -> None:
    reference = shop.publish(verdict=None)
    shop.judge(reference)
    shop.point(reference, key=generate_key())
    with pytest.raises(UntrustedError, match="not trusted here"):
        shop.pull()
    assert shop.left() == []


@pytest.mark.parametrize(
    ("reference", "error", "said"),
    [
        ("nothing", NotFoundError, "did you mean|it has tiny"),
        ("tiny/nothing", NotFoundError, "has no variant"),
        ("tiny:9.9-aaaaaaaaaaaa", NotFoundError, "there is no"),
        ("tiny:nightly", NotFoundError, "tiny:stable"),
        ("tiny@sha256:" + "0" * 64, NotFoundError, "has no tiny@sha256"),
        ("tiny@sha256:12", RecipeError, "digest"),
        ("Tiny", RecipeError, "did you mean tiny"),
    ],
)
def test_what_a_reference_does_not_name_is_explained(
    shop: Shop, reference: str, error: type[Exception], said: str
) -> None:
    shop.publish()
    with pytest.raises(error, match=said):
        shop.pull(reference)


def test_every_form_of_a_reference_finds_the_package(shop: Shop) -> None:
    reference = shop.publish()
    for number, text in enumerate(
        [
            "tiny",
            "tiny:stable",
            f"tiny/{reference.variant}",
            f"tiny:{reference.version}",
            f"tiny/{reference.variant}:{reference.version}",
            f"tiny@sha256:{reference.digest}",
            f"tiny/{reference.variant}@sha256:{reference.digest}",
        ]
    ):
        assert shop.pull(text, to=shop.home / str(number)).digest == reference.digest


def test_channel_is_for_references_that_name_none(shop: Shop) -> None:
    reference = shop.publish(channel="candidate")
    with pytest.raises(NotFoundError):
        shop.pull()
    with pytest.raises(RecipeError, match="--channel"):
        shop.pull("tiny:stable", channel="candidate")
    assert shop.pull(channel="candidate").digest == reference.digest


def test_a_channel_that_points_to_other_bytes_is_corrupt(shop: Shop) -> None:
    reference = shop.publish(verdict=None)
    shop.judge(reference)
    shop.point(replace(reference, digest="0" * 64))
    with pytest.raises(CorruptError, match="was changed after it was published"):
        shop.pull()


def test_a_full_disk_is_found_out_before_the_first_byte(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.publish()
    usage = shutil.disk_usage(shop.home)
    monkeypatch.setattr(
        "pipeline.registry.client.deliver.shutil.disk_usage", lambda path: usage._replace(free=100)
    )
    with pytest.raises(TransientError, match="disk full"):
        shop.pull()
    assert shop.left() == []


def test_offline_takes_it_from_the_cache_without_asking_the_store(shop: Shop) -> None:
    reference = shop.publish()
    shop.pull(through_cache=True)
    shutil.rmtree(shop.store.url)
    again = run(
        shop.request(
            f"tiny@sha256:{reference.digest}",
            to=shop.home / "again",
            offline=True,
            registry="s3://nowhere/at-all",
        )
    )
    assert (again.came, again.fetched_bytes, again.proven) == ("cache", 0, "proven")
    assert engine_files(shop.home / "again") == engine_files(shop.to)
    with pytest.raises(NotFoundError, match=f"no channels.*{reference.version}"):
        run(shop.request(offline=True, to=shop.home / "third"))


def test_the_python_api_pulls_as_the_command_does(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = shop.publish()
    monkeypatch.setenv("ENGINESMITH_POLICY", str(shop.policy()))
    pulled = pull("tiny", to=shop.to, registry=shop.store.url, gpu="rtx4090")
    assert pulled.digest == reference.digest
    assert pulled.engine_dir == shop.to.absolute() / "engine"
    cached = pull("tiny", registry=shop.store.url, gpu="rtx4090")
    assert cached.dir.name == reference.digest


def test_a_local_key_counts_for_a_folder_of_this_machine_only(shop: Shop) -> None:
    reference = shop.publish()
    write_key_pair(shop.key, shop.home / "config" / "local.key")
    environ = {"ENGINESMITH_CONFIG": str(shop.home / "config")}
    assert shop.pull(policy=None, environ=environ).digest == reference.digest
    elsewhere = FaultyStore(store=shop.store, local=False)
    with pytest.raises(UntrustedError, match="not trusted here"):
        shop.pull(store=elsewhere, policy=None, environ=environ, to=shop.home / "other")
