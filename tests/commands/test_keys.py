"""keygen, policy and sign, as the command line has them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from pipeline.commands import keys
from pipeline.core.errors import ConflictError, RecipeError
from pipeline.registry.promotion import promote
from pipeline.registry.reference import reference_of
from pipeline.registry.resolve import Terms, resolve
from pipeline.registry.trust.keys import generate_key, read_private_key, read_public_key
from pipeline.registry.trust.policy import ROLES, load_policy, own_trust
from pipeline.registry.trust.statements import Author
from tests.registry.packages import place_of
from tests.registry.trust.conftest import CARD, Team, team

__all__ = ["team"]

_APP = typer.Typer()
for _command in ("keygen", "policy", "sign"):
    _APP.command(_command)(getattr(keys, _command))


def run(home: Path, *words: str) -> Result:
    unset = {name: None for name in os.environ if name.startswith("ENGINESMITH_")}
    return CliRunner().invoke(
        _APP, words, env={**unset, "CI": None, "ENGINESMITH_CONFIG": str(home)}
    )


def test_keygen_makes_one_key_and_replaces_none(tmp_path: Path) -> None:
    done = run(tmp_path, "keygen", "--out", str(tmp_path / "ci.key"))
    assert done.exit_code == 0
    assert read_public_key(tmp_path / "ci.key.pub").keyid in done.stdout
    secret = (tmp_path / "ci.key").read_text()
    assert secret.splitlines()[1] not in done.output
    again = run(tmp_path, "keygen", "--out", str(tmp_path / "ci.key"))
    assert isinstance(again.exception, ConflictError)
    assert (tmp_path / "ci.key").read_text() == secret
    assert run(tmp_path, "keygen").exit_code == 0
    assert (tmp_path / "signing.key").exists()


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
    policy = tmp_path / "team.json"
    entries = [
        {"name": key.name, "public_key": key.public_key, "may_sign": list(key.may_sign)}
        for key in team.policy.keys
    ]
    policy.write_text(json.dumps({"schema": 1, "keys": entries}))
    text = str(reference_of(package))
    words = ("sign", text, "--registry", team.store.url, "--key", str(tmp_path / "ci.key"))
    done = run(tmp_path, *words, "--policy", str(policy))
    assert done.exit_code == 0, done.output
    key = read_private_key(tmp_path / "ci.key")
    ours = own_trust(key.public)
    found = resolve(team.store, text, Terms(policy=ours))
    assert [one.verdict for one in found.verification.verdicts] == ["accepted", "rejected"]
    assert found.verification.builder_id
    author = Author(key=key, actor="ci")
    done_move = promote(team.store, text, channel="stable", card=CARD, author=author, policy=ours)
    assert done_move.changed
    newest = found.verification.newest(CARD)
    assert newest is not None
    raw = team.store.read_statement(place_of(package), newest.statement)
    assert raw.files["report.html"] == b"<p>"


@pytest.mark.parametrize("stranger", [True, False])
def test_sign_vouches_for_nothing_that_is_not_trusted_here(
    team: Team, tmp_path: Path, stranger: bool
) -> None:
    package = team.publish()
    run(tmp_path, "keygen", "--out", str(tmp_path / "ci.key"))
    before = team.store.read_statements(place_of(package))
    if stranger:
        (tmp_path / "local.key").write_bytes(generate_key().private_pem())
        (tmp_path / "local.key").chmod(0o600)
    text = str(reference_of(package))
    words = ("sign", text, "--registry", team.store.url, "--key", str(tmp_path / "ci.key"))
    assert run(tmp_path, *words).exception is not None
    assert team.store.read_statements(place_of(package)) == before
