"""keygen, policy, sign, promote, rollback, yank, channels and gc, as the command line has them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from pipeline.commands import lifecycle
from pipeline.core.errors import ConflictError, ExitCode, PipelineError, RecipeError
from pipeline.core.published import Reference
from pipeline.registry.reference import reference_of
from pipeline.registry.resolve import resolve
from pipeline.registry.trust.policy import ROLES, load_policy, own_trust
from pipeline.registry.trust.private_key import read_private_key
from pipeline.registry.trust.signing import generate_key
from pipeline.registry.trust.verification import Terms
from tests.registry.packages import VARIANT, place_of, read_files
from tests.registry.team import CARD, Team

_APP = typer.Typer()
for _command in (
    "keygen", "policy", "sign", "promote", "rollback", "yank", "gc", "channels"
):  # fmt: skip
    _APP.command(_command)(getattr(lifecycle, _command))


def run(home: Path, *words: str, **environ: str | None) -> Result:
    """A command with nothing of this machine's configuration."""
    unset = {name: None for name in os.environ if name.startswith(("ENGINESMITH_", "GITHUB_"))}
    env = {**unset, "CI": None, "ENGINESMITH_CONFIG": str(home), **environ}
    return CliRunner().invoke(_APP, words, env=env)


@dataclass(frozen=True)
class Terminal:
    """The command line of the one who releases."""

    team: Team
    home: Path

    def run(self, *words: str, **environ: str | None) -> Result:
        """A command in an environment with the releaser's key and the team's policy."""
        given = {
            "ENGINESMITH_ACTOR": "ada",
            "ENGINESMITH_SIGNING_KEY_PEM": self.team.releaser.private_pem().decode(),
            "ENGINESMITH_POLICY": str(self.team.policy_file()),
        }
        return run(self.home, *words, "--registry", self.team.store.url, **{**given, **environ})

    def ask(self, *words: str, code: int = ExitCode.OK) -> dict[str, Any]:
        """The JSON of a command; its exit code is in it, and is the process's too."""
        result = self.run(*words, "--json")
        value: dict[str, Any] = json.loads(result.stdout)
        assert (value["schema"], value["exit_code"]) == (1, code), value
        if isinstance(result.exception, PipelineError):
            assert result.exception.exit_code == code
        else:
            assert result.exit_code == code
        return value

    def publish(self, plan: bytes = b"plan", verdict: str = "accepted") -> Reference:
        return reference_of(self.team.publish(plan, verdict))


@pytest.fixture
def terminal(team: Team, tmp_path: Path) -> Terminal:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    return Terminal(team=team, home=home)


def test_yank_names_the_channels_that_point_to_the_package(
    terminal: Terminal, caplog: pytest.LogCaptureFixture
) -> None:
    reference = terminal.publish()
    terminal.ask("promote", str(reference))
    shown = terminal.run("yank", str(reference), "--reason", "wrong answers").stdout
    assert "is yanked by ada at " in shown
    assert "wrong answers" in shown
    advice = f"enginesmith rollback tiny/{VARIANT} --channel stable --card {CARD}"
    assert f"{advice} --registry {terminal.team.store.url}" in shown
    value = terminal.ask("yank", str(reference), "--reason", "again")
    assert (value["yanked"], value["changed"]) == (True, False)
    assert value["channels"] == [{"channel": "stable", "card": CARD}]
    assert "was yanked by ada" in caplog.text
    assert "--allow-yanked" not in caplog.text, "an option that was not given"
    value = terminal.ask("yank", str(reference), "--undo")
    assert (value["yanked"], value["changed"], value["channels"]) == (False, True, [])


def test_channels_show_the_newest_move_or_all(terminal: Terminal) -> None:
    assert "has no channels" in terminal.run("channels").stdout
    first, second = terminal.publish(b"one"), terminal.publish(b"two")
    terminal.ask("promote", str(first), "--reason", "first one")
    terminal.ask("promote", str(second))
    shown = terminal.run("channels").stdout
    assert second.version[-6:] in shown.replace("\n", "")
    assert "first one" not in shown
    assert "first one" in " ".join(terminal.run("channels", "tiny", "--history").stdout.split())
    (channel,) = terminal.ask("channels", f"tiny/{VARIANT}")["channels"]
    assert (channel["name"], channel["variant"], channel["channel"]) == ("tiny", VARIANT, "stable")
    assert [move["reference"] for move in channel["moves"]] == [str(first), str(second)]


def test_a_policy_of_some_keys_trusts_them_in_everything(tmp_path: Path) -> None:
    for name in ("ci", "ada"):
        run(tmp_path, "keygen", "--out", str(tmp_path / f"{name}.key"))
    files = [str(tmp_path / f"{name}.key.pub") for name in ("ci", "ada")]
    out = tmp_path / "policy.yaml"
    value = json.loads(run(tmp_path, "policy", *files, "--out", str(out), "--json").stdout)
    assert value["keys"] == ["ci", "ada"]
    policy = load_policy(out)
    assert {key.name: key.may_sign for key in policy.keys} == {"ci": ROLES, "ada": ROLES}
    before = out.read_bytes()
    assert isinstance(run(tmp_path, "policy", *files, "--out", str(out)).exception, ConflictError)
    assert out.read_bytes() == before
    private = run(tmp_path, "policy", str(tmp_path / "ci.key"), "--out", str(tmp_path / "new"))
    assert isinstance(private.exception, RecipeError)
    assert not (tmp_path / "new").exists()


def test_sign_makes_what_one_machine_built_and_tested_count_for_those_who_trust_another_key(
    team: Team, tmp_path: Path
) -> None:
    package = team.publish(verdict="rejected")
    team.test(package, "accepted")
    run(tmp_path, "keygen", "--out", str(tmp_path / "ci.key"))
    text = str(reference_of(package))
    words = ("sign", text, "--registry", team.store.url, "--key", str(tmp_path / "ci.key"))
    done = run(tmp_path, *words, "--policy", str(team.policy_file()))
    assert done.exit_code == 0, done.output
    key = read_private_key(tmp_path / "ci.key")
    ours = own_trust(key.public)
    found = resolve(team.store, text, Terms(policy=ours))
    assert [one.verdict for one in found.verdicts] == ["accepted", "rejected"]
    assert found.builder_id
    releaser = team.releasing(key=key, policy=ours)
    assert releaser.promote(text, "stable", CARD).changed
    newest = found.verdicts[0]
    files = read_files(team.store, place_of(package), newest.statement)
    assert files["report.html"] == b"<p>"


def test_sign_vouches_for_nothing_that_is_not_trusted_here(team: Team, tmp_path: Path) -> None:
    package = team.publish()
    run(tmp_path, "keygen", "--out", str(tmp_path / "ci.key"))
    before = team.store.read_statements(place_of(package))
    (tmp_path / "local.key").write_bytes(generate_key().private_pem())
    (tmp_path / "local.key").chmod(0o600)
    text = str(reference_of(package))
    words = ("sign", text, "--registry", team.store.url, "--key", str(tmp_path / "ci.key"))
    assert run(tmp_path, *words).exception is not None
    assert team.store.read_statements(place_of(package)) == before
