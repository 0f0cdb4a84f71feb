"""What a machine signs, with what, and whom it trusts; stock tools read it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import RecipeError, UntrustedError
from pipeline.registry.trust.machine import machine_trust
from pipeline.registry.trust.signing import (
    LOCAL_BUILDER,
    builder_of,
    can_sign_models,
    generate_key,
    sign_engine,
    signatory_for,
    write_key_pair,
)
from tests.registry.packages import sealed_package
from tests.registry.team import Team
from tests.registry.trust.test_statements import payload_of

KEY = generate_key()
needs_extra = pytest.mark.skipif(not can_sign_models(), reason="the extra `sign` is missing")
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


@pytest.mark.parametrize(
    ("rights", "builds", "enough"),
    [
        (["builds", "verdicts"], True, True),
        (["builds"], True, False),
        (["verdicts"], True, False),
        (["verdicts"], False, True),
        (["builds"], False, False),
    ],
)
def test_key_that_may_not_sign_what_a_run_signs_is_refused_at_once(
    tmp_path: Path, rights: list[str], builds: bool, enough: bool
) -> None:
    environ = _policy(tmp_path, may_sign=rights)
    with nullcontext() if enough else pytest.raises(UntrustedError, match="may not sign"):
        signatory_for(environ, "run", own_folder=False, builds=builds)


def test_builder_that_the_policy_does_not_name_is_refused_at_once(tmp_path: Path) -> None:
    environ = _policy(tmp_path)
    path = Path(environ["ENGINESMITH_POLICY"])
    policy = {**json.loads(path.read_text()), "builder_ids": [builder_of(_GITHUB, "run")[0]]}
    path.write_text(json.dumps(policy))
    with pytest.raises(UntrustedError, match="builder_ids"):
        signatory_for(environ, "run", own_folder=True)
    assert signatory_for(environ, "run", own_folder=True, builds=False)
    assert signatory_for({**environ, **_GITHUB}, "run", own_folder=True)


def test_builder_is_the_workflow_in_github_actions_and_else_a_local_machine() -> None:
    assert builder_of({}, "run-1") == (LOCAL_BUILDER, "run-1")
    assert builder_of({**_GITHUB, "GITHUB_ACTIONS": ""}, "run-1") == (LOCAL_BUILDER, "run-1")
    assert builder_of({**_GITHUB, "GITHUB_RUN_ATTEMPT": "2"}, "run-1") == (
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


@pytest.fixture
def manifest(tmp_path: Path) -> Mapping[str, Any]:
    """Of a package in tmp_path/package, with a file that git tools like to hide."""
    files = {
        "model.plan": b"plan",
        ".github/hidden.bin": b"native code",
        ".gitattributes": b"*.plan binary\n",
    }
    return sealed_package(tmp_path / "package", files).manifest


def _stock(folder: Path, public: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """What a user without our program does; no network may be needed."""
    signature = folder / "engine" / "model.sig"
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(folder / "engine")]
    return subprocess.run(
        [*command, "--public_key", str(public), "--signature", str(signature), *more],
        env={**os.environ, "HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
        check=False,
    )


@needs_extra
def test_stock_tool_verifies_the_engine_folder_and_refuses_a_changed_one(
    manifest: Mapping[str, Any], tmp_path: Path
) -> None:
    public = write_key_pair(KEY, tmp_path / "ci.key")
    (tmp_path / "package" / "engine" / "model.sig").write_bytes(sign_engine(manifest, KEY))
    mounted = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "package", mounted)
    done = _stock(mounted, public, "--no-ignore-git-paths")
    assert (done.returncode, "succeeded" in done.stdout) == (0, True), done.stdout + done.stderr
    stranger = write_key_pair(generate_key(), tmp_path / "other.key")
    assert _stock(mounted, stranger, "--no-ignore-git-paths").returncode == 1
    (mounted / "engine" / ".github" / "hidden.bin").write_bytes(b"native c0de")
    assert _stock(mounted, public, "--no-ignore-git-paths").returncode == 1


@needs_extra
def test_private_key_is_on_no_disk_while_signing(
    manifest: Mapping[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def kept() -> Iterator[str]:
        yield str(tmp_path / "kept")

    (tmp_path / "kept").mkdir()
    monkeypatch.setattr("tempfile.TemporaryDirectory", kept)
    sign_engine(manifest, KEY)
    (found,) = (tmp_path / "kept").iterdir()
    assert found.name == "model.sig"
    assert b"PRIVATE" not in found.read_bytes()


def test_provenance_is_what_slsa_wants(team: Team) -> None:
    package = team.seal()
    raw = team.statements(package)[-1]
    value = payload_of(raw.envelope)
    assert value["subject"] == [{"name": "manifest.json", "digest": {"sha256": package.digest}}]
    assert value["predicateType"] == "https://slsa.dev/provenance/v1"
    (weights,) = value["predicate"]["buildDefinition"]["resolvedDependencies"]
    assert weights["digest"] == {"gitCommit": "0" * 40}
    run = value["predicate"]["runDetails"]
    assert run["builder"]["id"] == "https://ci.example/build"
    assert run["metadata"]["startedOn"] == "2026-11-25T09:00:00Z"


def test_the_reference_library_of_in_toto_reads_what_is_signed(team: Team) -> None:
    pytest.importorskip("in_toto_attestation", reason="comes with the extra `sign`")
    from google.protobuf import json_format
    from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
    from in_toto_attestation.v1 import statement_pb2
    from in_toto_attestation.v1.statement import Statement

    package = team.publish()
    raws = [*team.statements(package), team.test(package, "accepted")]
    for raw in raws:
        value = payload_of(raw.envelope)
        message = json_format.Parse(json.dumps(value), statement_pb2.Statement())
        Statement.copy_from_pb(message).validate()
        if raw.kind == "provenance":
            predicate = value["predicate"]
            del predicate["enginesmith_statement"]
            json_format.Parse(json.dumps(predicate), provenance_pb2.Provenance())
