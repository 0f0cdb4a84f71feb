"""What a machine signs with, and what it says of itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.core.errors import RecipeError, UntrustedError
from pipeline.registry.trust.keys import generate_key, write_key_pair
from pipeline.registry.trust.policy import machine_trust
from pipeline.registry.trust.signing import LOCAL_BUILDER, builder, signatory_for

_GITHUB = {
    "GITHUB_ACTIONS": "true",
    "GITHUB_SERVER_URL": "https://github.com",
    "GITHUB_REPOSITORY": "someone/engines",
    "GITHUB_WORKFLOW_REF": "someone/engines/.github/workflows/engine.yml@refs/heads/main",
    "GITHUB_RUN_ID": "17",
}


def _policy(tmp_path: Path, **more: object) -> dict[str, str]:
    """A key, a policy that trusts it, and the environment that names both."""
    public = write_key_pair(generate_key(), tmp_path / "ci.key").read_text()
    key = {"name": "ci", "public_key": public, "may_sign": ["builds", "verdicts"]}
    path = tmp_path / "policy.json"
    path.write_text(json.dumps({"schema": 1, "keys": [{**key, **more}]}))
    return {
        "ENGINESMITH_CONFIG": str(tmp_path / "config"),
        "ENGINESMITH_SIGNING_KEY": str(tmp_path / "ci.key"),
        "ENGINESMITH_POLICY": str(path),
    }


def test_local_key_signs_nothing_that_leaves_the_machine(tmp_path: Path) -> None:
    environ = {"ENGINESMITH_CONFIG": str(tmp_path / "config")}
    with pytest.raises(RecipeError, match="enginesmith keygen"):
        signatory_for(environ, "run", own_folder=False)
    assert not (tmp_path / "config").exists()
    signatory_for(environ, "run", own_folder=True)
    assert machine_trust(environ, own_folder=True).keys
    assert not machine_trust(environ, own_folder=False).keys


@pytest.mark.parametrize("rights", [["builds"], ["verdicts"]])
def test_key_that_may_not_sign_both_is_refused_at_once(tmp_path: Path, rights: list[str]) -> None:
    assert signatory_for(_policy(tmp_path), "run", own_folder=False)
    (tmp_path / "less").mkdir()
    with pytest.raises(UntrustedError, match="may not sign"):
        signatory_for(_policy(tmp_path / "less", may_sign=rights), "run", own_folder=True)


def test_key_for_verdicts_alone_signs_them_where_nothing_is_built(tmp_path: Path) -> None:
    environ = _policy(tmp_path, may_sign=["verdicts"])
    path = Path(environ["ENGINESMITH_POLICY"])
    policy = {**json.loads(path.read_text()), "builder_ids": [builder(_GITHUB, "run")[0]]}
    path.write_text(json.dumps(policy))
    assert signatory_for(environ, "run", own_folder=False, builds=False)
    (tmp_path / "less").mkdir()
    with pytest.raises(UntrustedError, match="may not sign verdicts"):
        signatory_for(
            _policy(tmp_path / "less", may_sign=["builds"]), "run", own_folder=False, builds=False
        )


def test_builder_that_the_policy_does_not_name_is_refused_at_once(tmp_path: Path) -> None:
    environ = _policy(tmp_path)
    path = Path(environ["ENGINESMITH_POLICY"])
    policy = {**json.loads(path.read_text()), "builder_ids": [builder(_GITHUB, "run")[0]]}
    path.write_text(json.dumps(policy))
    with pytest.raises(UntrustedError, match="builder_ids"):
        signatory_for(environ, "run", own_folder=True)
    assert signatory_for({**environ, **_GITHUB}, "run", own_folder=True)


def test_builder_is_the_workflow_in_github_actions_and_else_a_local_machine() -> None:
    assert builder({}, "run-1") == (LOCAL_BUILDER, "run-1")
    assert builder({**_GITHUB, "GITHUB_ACTIONS": ""}, "run-1") == (LOCAL_BUILDER, "run-1")
    assert builder({**_GITHUB, "GITHUB_RUN_ATTEMPT": "2"}, "run-1") == (
        "https://github.com/someone/engines/.github/workflows/engine.yml@refs/heads/main",
        "https://github.com/someone/engines/actions/runs/17/attempts/2",
    )


def test_a_policy_decides_alone(tmp_path: Path) -> None:
    environ = _policy(tmp_path)
    (key,) = machine_trust(environ, own_folder=True).keys
    assert key.name == "ci"
    other = tmp_path / "other.json"
    other.write_text('{"schema": 1}')
    assert machine_trust(environ, own_folder=True, policy=other).keys == ()
