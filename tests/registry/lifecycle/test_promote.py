"""What may enter a channel, and the way back."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import (
    ConflictError,
    CorruptError,
    NotAcceptedError,
    NotFoundError,
    RecipeError,
    UntrustedError,
)
from pipeline.core.values import Reference, VerdictName
from pipeline.registry.lifecycle import channels, evidence
from pipeline.registry.lifecycle.channels import read_channel
from pipeline.registry.lifecycle.yank import yank_package
from pipeline.registry.signing.keys import generate_key
from pipeline.registry.signing.trust import TrustPolicy
from pipeline.registry.stores.store import Place
from tests.registry.lifecycle.conftest import CARD, OTHER_CARD, VARIANT

World = Any
_PROMOTE = "pipeline.registry.lifecycle.promote"


def _stable(world: World, channel: str = "stable", card: str = CARD) -> Reference | None:
    move = read_channel(world.store, world.policy, "tiny", VARIANT, channel, card)
    return move.reference if move else None


def _root(world: World) -> Path:
    return Path(world.store.url)


def test_accepted_package_enters_stable_of_its_card(world: World) -> None:
    reference = world.publish()
    done = world.promote(f"tiny:{reference.version}", author=world.author(reason="ready"))
    assert done.changed
    assert done.before is None
    assert (done.move.card, done.move.reason, done.verdict.verdict) == (CARD, "ready", "accepted")
    assert _stable(world) == reference
    assert not world.promote(f"tiny@sha256:{reference.digest}").changed


def test_promotion_goes_from_channel_to_channel(world: World) -> None:
    reference = world.publish()
    world.promote(f"tiny:{reference.version}", "candidate")
    assert world.promote("tiny:candidate").move.reference == reference


@pytest.mark.parametrize("verdict", ["checked", "compiled"])
def test_what_did_not_run_on_the_card_enters_candidate_but_not_stable(
    world: World, verdict: VerdictName
) -> None:
    reference = world.publish(verdict=verdict)
    world.promote(f"tiny:{reference.version}", "candidate")
    world.promote(f"tiny:{reference.version}", "canary")
    with pytest.raises(NotAcceptedError, match=verdict):
        world.promote("tiny:candidate")
    assert _stable(world) is None
    assert _stable(world, "candidate") == _stable(world, "canary") == reference


@pytest.mark.parametrize("verdict", ["rejected", "regression", "anomalous", "inconclusive"])
def test_what_failed_enters_nothing(world: World, verdict: VerdictName) -> None:
    reference = world.publish(verdict=verdict)
    for channel in ("stable", "candidate"):
        with pytest.raises(NotAcceptedError, match=verdict):
            world.promote(f"tiny:{reference.version}", channel)
    assert not world.log_dir().exists()


def test_the_newest_verdict_counts(world: World) -> None:
    reference = world.publish()
    world.age(reference, 1)
    world.judge(reference, "regression", name="test-0")
    with pytest.raises(NotAcceptedError, match="regression"):
        world.promote(f"tiny:{reference.version}")


def test_a_verdict_counts_for_its_card_alone(world: World) -> None:
    reference = world.publish()
    with pytest.raises(UntrustedError, match="no signed test result for this card"):
        world.promote(f"tiny:{reference.version}", card=OTHER_CARD)
    world.judge(reference, card=OTHER_CARD, name="test-2")
    with pytest.raises(RecipeError, match=f"{CARD}, {OTHER_CARD}; name one"):
        world.promote(f"tiny:{reference.version}")
    world.promote(f"tiny:{reference.version}", card=OTHER_CARD)
    assert _stable(world, card=OTHER_CARD) == reference
    assert _stable(world) is None


def test_unsigned_and_strangers_words_count_for_nothing(world: World) -> None:
    unsigned = world.publish("1.0", signed=False)
    with pytest.raises(UntrustedError, match="is not signed"):
        world.promote(f"tiny:{unsigned.version}")
    silent = world.publish("2.0", verdict=None)
    with pytest.raises(UntrustedError, match="no signed test result"):
        world.promote(f"tiny:{silent.version}")
    world.judge(silent, key=generate_key())
    with pytest.raises(UntrustedError, match="is not trusted here"):
        world.promote(f"tiny:{silent.version}")
    assert not world.log_dir().exists()


def test_revoked_package_is_not_promoted(world: World) -> None:
    reference = world.publish()
    policy = TrustPolicy(keys=world.policy.keys, revoked_digests=(reference.digest,))
    with pytest.raises(UntrustedError, match="is revoked"):
        world.promote(f"tiny:{reference.version}", policy=policy)


def test_changed_manifest_is_not_promoted(world: World) -> None:
    reference = world.publish()
    world.promote(f"tiny:{reference.version}", "candidate")
    path = _root(world) / "tiny" / VARIANT / reference.version / "manifest.json"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes().replace(b"Apache-2.0", b"Apache-2.1"))
    with pytest.raises(CorruptError, match="has digest") as raised:
        world.promote("tiny:candidate")
    assert "/tmp" not in str(raised.value).replace(str(_root(world)), "")


def test_messages_name_the_registry_and_not_where_statements_were_laid_out(world: World) -> None:
    reference = world.publish(signed=False)
    with pytest.raises(UntrustedError) as raised:
        world.promote(f"tiny:{reference.version}")
    assert f"{_root(world)}/tiny/{VARIANT}/{reference.version}" in str(raised.value)
    assert "enginesmith-" not in str(raised.value)


def test_a_key_without_the_right_is_told_so_before_anything_is_read(world: World) -> None:
    reference = world.publish(signed=False)
    stranger = world.author()
    stranger = type(stranger)(key=generate_key(), actor="eve")
    with pytest.raises(UntrustedError, match="sign with another key"):
        world.promote(f"tiny:{reference.version}", author=stranger)


def test_rollback_is_a_new_move_to_the_package_before(world: World) -> None:
    first, second = world.publish("1.0"), world.publish("2.0")
    for reference in (first, second):
        world.promote(f"tiny:{reference.version}")
    done = world.rollback(author=world.author(reason="too hot"))
    assert (done.move.seq, done.move.reference, done.before) == (3, first, second)
    assert done.move.reason == "too hot"
    assert world.rollback().move.reference == second  # and back again


def test_rollback_goes_further_back_when_told(world: World) -> None:
    first, second, third = (world.publish(version) for version in ("1.0", "2.0", "3.0"))
    for reference in (first, second, third):
        world.promote(f"tiny:{reference.version}")
    assert world.rollback().move.reference == second
    assert world.rollback(to=f"tiny:{first.version}").move.reference == first
    never = world.publish("4.0")
    with pytest.raises(RecipeError, match="was never in stable") as raised:
        world.rollback(to=f"tiny:{never.version}")
    assert second.version in str(raised.value)


def test_rollback_without_a_past_says_so(world: World) -> None:
    reference = world.publish()
    with pytest.raises(NotFoundError, match="no stable that was ever moved"):
        world.rollback()
    world.promote(f"tiny:{reference.version}")
    with pytest.raises(NotFoundError, match="nothing to roll back to"):
        world.rollback()
    with pytest.raises(NotFoundError, match="has no nothing"):
        world.rollback("nothing")
    with pytest.raises(RecipeError, match=r"--to tiny:1\.0"):
        world.rollback("tiny:1.0")


def test_rollback_refuses_what_is_not_good_enough_any_more(world: World) -> None:
    first, second = world.publish("1.0"), world.publish("2.0")
    for reference in (first, second):
        world.promote(f"tiny:{reference.version}")
    yank_package(world.store, first, world.author(reason="leaks"), world.policy)
    with pytest.raises(UntrustedError, match="was yanked by ada"):
        world.rollback()
    assert _stable(world) == second


def test_rollback_asks_which_card_is_meant(world: World) -> None:
    references = [world.publish(version) for version in ("1.0", "2.0")]
    for reference in references:
        world.judge(reference, card=OTHER_CARD, name="test-2")
        for card in (CARD, OTHER_CARD):
            world.promote(f"tiny:{reference.version}", card=card)
    with pytest.raises(RecipeError, match=f"--card {CARD}.*--card {OTHER_CARD}"):
        world.rollback()
    world.rollback(card=OTHER_CARD)
    assert _stable(world) == references[1]
    assert _stable(world, card=OTHER_CARD) == references[0]


def test_rollback_that_somebody_overtook_is_a_conflict(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = (world.publish(version) for version in ("1.0", "2.0", "3.0"))
    for reference in (first, second):
        world.promote(f"tiny:{reference.version}")
    real = evidence.require_admissible

    def overtaken(*args: Any, **kwargs: Any) -> Any:
        world.move(third, actor="eve")
        return real(*args, **kwargs)

    monkeypatch.setattr(f"{_PROMOTE}.require_admissible", overtaken)
    with pytest.raises(ConflictError, match="eve moved stable"):
        world.rollback()
    assert _stable(world) == third


def test_promotion_of_what_was_removed_meanwhile_says_so(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = world.publish()
    real = channels.move_channel

    def removed(*args: Any, **kwargs: Any) -> Any:
        move = real(*args, **kwargs)
        world.store.delete_version(Place.of(reference))
        return move

    monkeypatch.setattr(f"{_PROMOTE}.move_channel", removed)
    with pytest.raises(NotFoundError, match="was removed while stable was moved"):
        world.promote(f"tiny:{reference.version}")


def test_a_channel_whose_log_was_touched_names_nothing(world: World) -> None:
    reference = world.publish()
    world.promote(f"tiny:{reference.version}", "candidate")
    world.store.put_move("tiny", VARIANT, f"candidate.{CARD}.000002.dsse.json", b"rubbish")
    with pytest.raises(UntrustedError, match="not a DSSE envelope"):
        world.promote("tiny:candidate")
    with pytest.raises(UntrustedError, match="not a DSSE envelope"):
        world.promote(f"tiny:{reference.version}", "candidate")
    done = world.promote(f"tiny:{reference.version}", "candidate", restart=True)
    assert (done.move.seq, done.before) == (3, None)


def test_a_pointer_that_cannot_be_written_does_not_undo_the_move(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    reference = world.publish()
    (world.log_dir().parent / f"stable.{CARD}.json").mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        world.promote(f"tiny:{reference.version}")
    assert _stable(world) == reference
    assert "could not be brought up to it" in caplog.text
