"""promote, rollback, yank, gc and channels, as the command line has them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from pipeline.commands import lifecycle
from pipeline.core.errors import ExitCode, PipelineError, RecipeError, UntrustedError
from pipeline.registry.lifecycle.command import open_desk
from pipeline.registry.signing.keys import generate_key, write_key_pair
from tests.registry.lifecycle.conftest import CARD, OTHER_CARD, VARIANT

World = Any

_APP = typer.Typer()
for _command in ("promote", "rollback", "yank", "gc", "channels"):
    _APP.command(_command)(getattr(lifecycle, _command))


def _run(world: World, *words: str, **environ: str) -> Result:
    """Run in the environment of the one who releases; what a machine has set does not count."""
    unset = {name: None for name in os.environ if name.startswith(("ENGINESMITH_", "GITHUB_"))}
    given = {**unset, "CI": None, **world.environ(), **environ}
    return CliRunner().invoke(_APP, [*words, "--registry", world.store.url], env=given)


def _ask(world: World, *words: str, code: int = ExitCode.OK) -> dict[str, Any]:
    """The JSON of a command; its exit code is in it, and is the process's too."""
    result = _run(world, *words, "--json")
    value: dict[str, Any] = json.loads(result.stdout)
    assert value["schema"] == 1
    assert value["exit_code"] == code
    if isinstance(result.exception, PipelineError):
        assert result.exception.exit_code == code
    else:
        assert result.exit_code == code
    return value


def _policy(world: World, *keys: dict[str, Any]) -> Path:
    path: Path = world.home / "policy.json"
    path.write_text(json.dumps({"schema": 1, "keys": list(keys)}))
    return path


def test_promote_says_what_it_was_and_is(world: World) -> None:
    first, second = world.publish("1.0"), world.publish("2.0")
    said = _run(world, "promote", f"tiny:{first.version}", "--reason", "ready").stdout
    assert said.splitlines()[0] == f"stable of {CARD} is {first} (move 1; it was nowhere)"
    value = _ask(world, "promote", f"tiny:{second.version}", "--card", CARD)
    assert value == {
        "schema": 1,
        "exit_code": 0,
        "reference": str(second),
        "digest": second.digest,
        "channel": "stable",
        "card": CARD,
        "seq": 2,
        "actor": "ada",
        "reason": "",
        "at": value["at"],
        "signer": "this machine's signing key",
        "restart": False,
        "changed": True,
        "before": str(first),
        "verdict": "accepted",
    }
    assert not _ask(world, "promote", f"tiny:{second.version}")["changed"]
    assert "it was so already" in _run(world, "promote", f"tiny:{second.version}").stdout


def test_rollback_and_its_reason(world: World) -> None:
    references = [world.publish(version) for version in ("1.0", "2.0", "3.0")]
    for reference in references:
        _ask(world, "promote", f"tiny:{reference.version}", "--channel", "mine")
    value = _ask(world, "rollback", "tiny", "--channel", "mine", "--reason", "slow")
    assert (value["reference"], value["seq"]) == (str(references[1]), 4)
    assert value["reason"] == "slow"
    to = f"tiny/{VARIANT}:{references[0].version}"
    value = _ask(world, "rollback", f"tiny/{VARIANT}", "--channel", "mine", "--to", to)
    assert value["reference"] == str(references[0])


def test_yank_names_the_channels_that_point_there(world: World) -> None:
    first, second = world.publish("1.0"), world.publish("2.0")
    for reference in (first, second):
        _ask(world, "promote", f"tiny:{reference.version}")
    said = _run(world, "yank", f"tiny:{second.version}", "--reason", "crashes").stdout
    assert f"{second} is yanked" in said
    assert f"warning stable of {CARD} points to it" in said
    assert f"rollback tiny/{VARIANT} --channel stable --card {CARD}" in said
    value = _ask(world, "yank", f"tiny:{first.version}", "--reason", "old")
    assert (value["channels"], value["yanked"], value["changed"]) == ([], True, True)
    value = _ask(world, "yank", f"tiny:{first.version}", "--undo")
    assert (value["yanked"], value["seq"]) == (False, 2)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("promote", "tiny:9.9"), ExitCode.NOT_FOUND),
        (("promote", "nothing"), ExitCode.NOT_FOUND),
        (("promote", "not a reference"), ExitCode.USAGE),
        (("promote", "tiny:1.0-bbbbbbbbbbbb", "--channel", "9"), ExitCode.USAGE),
        (("promote", "tiny:1.0-bbbbbbbbbbbb"), ExitCode.NOT_ACCEPTED),
        (("promote", "tiny:1.0-bbbbbbbbbbbb", "--card", OTHER_CARD), ExitCode.UNTRUSTED),
        (("rollback", "tiny"), ExitCode.NOT_FOUND),
        (("yank", "tiny:1.0-bbbbbbbbbbbb"), ExitCode.USAGE),
        (("gc", "--keep", "tiny:9.9"), ExitCode.NOT_FOUND),
        (("channels", "nothing"), ExitCode.NOT_FOUND),
        (("channels", "tiny:stable"), ExitCode.USAGE),
    ],
)
def test_refusals_have_their_exit_codes(
    world: World, words: tuple[str, ...], code: ExitCode
) -> None:
    world.publish(verdict="checked")
    assert _ask(world, *words, code=code)["message"]


def test_channels_shows_moves_and_what_is_odd(world: World) -> None:
    first, second = world.publish("1.0"), world.publish("2.0")
    assert "has no channels" in _run(world, "channels").stdout
    for reference in (first, second):
        _ask(world, "promote", f"tiny:{reference.version}", "--reason", f"for {reference.version}")
    short, long = (_run(world, "channels", "tiny", *more).stdout for more in ((), ("--history",)))
    assert second.version in short
    assert first.version not in short
    assert first.version in long
    world.store.put_channel("tiny", VARIANT, f"stable.{CARD}.json", b"{}")
    pointer = json.dumps({"version": first.version}).encode()
    world.store.put_channel("tiny", VARIANT, f"old.{CARD}.json", pointer)
    value = _ask(world, "channels")
    assert [(one["channel"], len(one["moves"])) for one in value["channels"]] == [
        ("stable", 2),
        ("old", 0),
    ]
    assert "the next move repairs it" in value["channels"][0]["note"]
    assert f"an unsigned pointer to {first.version}" in value["channels"][1]["note"]


def test_channels_exits_as_untrusted_when_a_log_was_touched(world: World) -> None:
    reference = world.publish()
    _ask(world, "promote", f"tiny:{reference.version}")
    world.store.put_move("tiny", VARIANT, f"stable.{CARD}.000002.dsse.json", b"rubbish")
    value = _ask(world, "channels", code=ExitCode.UNTRUSTED)
    assert "not a DSSE envelope" in value["channels"][0]["note"]
    result = _run(world, "channels")
    assert result.exit_code == ExitCode.UNTRUSTED
    assert f"tiny/{VARIANT}: ?" in result.stdout
    refused = _ask(world, "promote", f"tiny:{reference.version}", code=ExitCode.UNTRUSTED)
    assert "--restart-log" in refused["message"] or "sign again" in refused["message"]
    assert _ask(world, "promote", f"tiny:{reference.version}", "--restart-log")["restart"]
    _ask(world, "channels")


def test_gc_shows_first_and_removes_when_told(world: World) -> None:
    old, kept = world.publish("1.0"), world.publish("2.0")
    for reference in (old, kept):
        world.age(reference, 90)
    _ask(world, "promote", f"tiny:{kept.version}")
    said = _run(world, "gc").stdout
    assert "1 versions of" in said
    assert "nothing was removed" in said
    assert str(old) in said
    value = _ask(world, "gc")
    assert [(one["reference"], one["remove"]) for one in value["versions"]] == [
        (str(old), True),
        (str(kept), False),
    ]
    assert not [
        one
        for one in _ask(world, "gc", "--keep", f"tiny:{old.version}")["versions"]
        if one["remove"]
    ]
    value = _ask(world, "gc", "--delete")
    assert (value["deleted"], value["removed"]) == (True, [str(old)])
    assert value["freed_bytes"] > 0
    assert world.store.versions("tiny", VARIANT) == [kept.version]


def test_gc_exits_as_untrusted_when_it_had_to_keep_a_variant(world: World) -> None:
    reference = world.publish()
    _ask(world, "promote", f"tiny:{reference.version}")
    world.store.put_move("tiny", VARIANT, f"stable.{CARD}.000003.dsse.json", b"rubbish")
    assert _ask(world, "gc", code=ExitCode.UNTRUSTED)["faults"]


def test_a_policy_that_gives_channels_to_others_stops_this_key(world: World) -> None:
    reference = world.publish()
    pem = {"public_key": world.key.public.pem.decode()}
    release = {"public_key": generate_key().public.pem.decode()}
    policy = _policy(
        world,
        {"name": "ci", **pem, "may_sign": ["builds", "verdicts"]},
        {"name": "release", **release, "may_sign": ["channels"]},
    )
    result = _run(world, "promote", f"tiny:{reference.version}", "--policy", str(policy))
    assert isinstance(result.exception, UntrustedError)
    assert "may not sign channels, only builds, verdicts" in str(result.exception)
    assert not world.log_dir().exists()


def test_the_local_key_serves_its_own_folder(world: World) -> None:
    environ = {**world.environ()}
    del environ["ENGINESMITH_SIGNING_KEY"]
    local = Path(environ["ENGINESMITH_CONFIG"]) / "local.key"
    with pytest.raises(RecipeError, match="no such key"):
        open_desk(world.store.url, None, environ).author("")
    write_key_pair(world.key, local)
    desk = open_desk(world.store.url, None, environ)
    assert desk.author("").key.public == world.key.public
    assert desk.policy.keys[0].name == "this machine's local key"
    assert desk.policy.keys[0].may_sign  # it is believed here, and nowhere else:
    elsewhere = open_desk("oci://127.0.0.1:1/engines", None, environ)
    assert elsewhere.policy.keys == ()
    with pytest.raises(RecipeError, match="local key does not count for oci://"):
        elsewhere.author("")


def test_without_a_key_in_ci_nothing_is_signed(world: World) -> None:
    reference = world.publish()
    result = _run(
        world, "promote", f"tiny:{reference.version}", CI="true", ENGINESMITH_SIGNING_KEY=""
    )
    assert isinstance(result.exception, RecipeError)
    assert "CI is set" in str(result.exception) or "has no" in str(result.exception)
