"""`enginesmith keygen` and `enginesmith verify`, as processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.core.errors import ExitCode
from pipeline.registry import pull
from pipeline.registry.signing.keys import choose_key, load_key, read_public_key
from pipeline.registry.signing.model_signature import available
from tests.registry.signing.conftest import LIGHT_INSTALL, Signed

ROOT = Path(__file__).parents[3]


@pytest.fixture
def environ(signed: Signed, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Nothing of this machine's own keys and policies."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name != "CI" and not name.startswith("ENGINESMITH_")
    }
    signed.home.mkdir()
    return {**kept, "PYTHONPATH": str(ROOT), "ENGINESMITH_CONFIG": str(signed.home / "config")}


def _run(environ: dict[str, str], cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *arguments],
        cwd=cwd,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )


def test_keygen_makes_one_key_and_replaces_none(signed: Signed, environ: dict[str, str]) -> None:
    done = _run(environ, signed.home, "keygen", "--out", "ci.key")
    assert done.returncode == 0, done.stderr
    assert (signed.home / "ci.key").stat().st_mode & 0o777 == 0o600
    assert read_public_key(signed.home / "ci.key.pub").keyid in done.stdout
    before = (signed.home / "ci.key").read_bytes()
    assert before.decode().splitlines()[1] not in done.stdout + done.stderr
    again = _run(environ, signed.home, "keygen", "--out", "ci.key")
    assert again.returncode == ExitCode.CONFLICT
    assert (signed.home / "ci.key").read_bytes() == before
    assert _run(environ, signed.home, "keygen").returncode == 0
    assert (signed.home / "config" / "signing.key").exists()


def test_verify_understands_a_pulled_folder_and_refuses_a_changed_one(
    signed: Signed, environ: dict[str, str]
) -> None:
    reference = signed.publish()
    policy = str(signed.write_policy())
    pulled = pull(
        f"tiny@sha256:{reference.digest}",
        to=signed.home / "models" / "tiny",
        registry=str(signed.bench.registry.path),
        gpu="none",
        policy=policy,
    )
    assert (pulled.dir / "engine" / "model.sig").exists() == available()
    arguments = ("verify", str(pulled.dir), "--policy", policy)
    done = _run(environ, signed.home, *arguments)
    assert done.returncode == 0, done.stderr
    assert f"sha256:{reference.digest}" in done.stdout
    assert "signed by builder" in done.stdout
    pulled.dir.chmod(0o755)
    (pulled.dir / "other.txt").write_text("more")
    assert _run(environ, signed.home, *arguments).returncode == ExitCode.CORRUPT
    (pulled.dir / "other.txt").unlink()
    assert _run(environ, signed.home, "verify", str(pulled.dir)).returncode == ExitCode.UNTRUSTED


def test_verify_prints_what_was_checked(signed: Signed, environ: dict[str, str]) -> None:
    reference = signed.publish()
    folder = signed.bench.registry.location(reference)
    policy = str(signed.write_policy())
    registry = str(signed.bench.registry.path)
    done = _run(environ, signed.home, "verify", str(folder), "--policy", policy)
    assert done.returncode == 0, done.stderr
    assert f"sha256:{reference.digest}" in done.stdout
    assert "signed by builder" in done.stdout
    assert "checked on NVIDIA-GeForce-RTX-4090, signed by judge" in done.stdout
    named = _run(
        environ, folder, "verify", str(reference), "--registry", registry, "--policy", policy,
        "--json",
    )  # fmt: skip
    answer = json.loads(named.stdout)
    assert answer["digest"] == reference.digest
    assert answer["signer"] == {"name": "builder", "keyid": signed.builder.public.keyid}
    assert answer["allow_unsigned"] is False
    assert [found["verdict"] for found in answer["verdicts"]] == ["checked"]
    here = _run({**environ, "ENGINESMITH_POLICY": policy}, folder, "verify", ".")
    assert here.returncode == 0, here.stderr


def test_verify_ends_with_the_code_of_the_fault(signed: Signed, environ: dict[str, str]) -> None:
    reference = signed.publish()
    folder = signed.bench.registry.location(reference)
    policy = signed.write_policy()
    # No policy and no key of this machine: the signature is a stranger's.
    done = _run(environ, signed.home, "verify", str(folder), "--json")
    assert done.returncode == ExitCode.UNTRUSTED
    assert json.loads(done.stdout)["exit_code"] == 5
    assert "Traceback" not in done.stderr
    revoking = signed.write_policy(revoked_digests=[reference.digest])
    done = _run(environ, signed.home, "verify", str(folder), "--policy", str(revoking))
    assert (done.returncode, "revoked" in done.stderr) == (5, True)
    policy.write_text("schema: 1\nkey: []\n")
    done = _run(environ, signed.home, "verify", str(folder), "--policy", str(policy))
    assert done.returncode == ExitCode.USAGE
    registry = ("--registry", str(signed.bench.registry.path))
    done = _run(environ, signed.home, "verify", "nothing:1.0", *registry)
    assert done.returncode == ExitCode.NOT_FOUND
    (folder / "engine" / "model.plan").chmod(0o644)
    (folder / "engine" / "model.plan").write_bytes(b"evil" * 100)
    done = _run(environ, signed.home, "verify", str(folder), "--policy", str(policy))
    assert done.returncode == ExitCode.USAGE  # a broken policy is not passed by
    done = _run(environ, signed.home, "verify", str(folder), "--policy", str(signed.write_policy()))
    assert done.returncode == ExitCode.CORRUPT


def test_unsigned_package_passes_only_with_the_flag_and_it_is_recorded(
    signed: Signed, environ: dict[str, str]
) -> None:
    folder = str(signed.bench.registry.location(signed.bench.publish()))
    assert _run(environ, signed.home, "verify", folder).returncode == ExitCode.UNTRUSTED
    done = _run(environ, signed.home, "verify", folder, "--allow-unsigned", "--json")
    answer = json.loads(done.stdout)
    assert (answer["signer"], answer["allow_unsigned"]) == (None, True)
    done = _run(environ, signed.home, "verify", folder, "--allow-unsigned")
    assert (done.returncode, "UNSIGNED" in done.stdout) == (0, True)


def test_local_key_is_believed_without_a_policy_and_not_beside_one(
    signed: Signed, environ: dict[str, str]
) -> None:
    key = load_key(choose_key(environ), environ)
    reference = signed.bench.publish()
    signed.sign(reference, key)
    signed.accept(reference, key)
    folder = str(signed.bench.registry.location(reference))
    done = _run(environ, signed.home, "verify", folder)
    assert (done.returncode, "local key" in done.stdout) == (0, True), done.stderr
    elsewhere = {**environ, "ENGINESMITH_CONFIG": str(signed.home / "other-machine")}
    assert _run(elsewhere, signed.home, "verify", folder).returncode == ExitCode.UNTRUSTED
    assert not (signed.home / "other-machine").exists()
    # In CI a local key signs nothing, so it vouches for nothing.
    assert _run({**environ, "CI": "1"}, signed.home, "verify", folder).returncode == 5
    usual = signed.home / "config" / "policy.yaml"
    usual.write_bytes(signed.write_policy().read_bytes())
    assert _run(environ, signed.home, "verify", folder).returncode == ExitCode.UNTRUSTED


def test_light_install_verifies_without_the_extra(signed: Signed, environ: dict[str, str]) -> None:
    reference = signed.publish()
    done = subprocess.run(
        [
            sys.executable, "-c", LIGHT_INSTALL,
            "verify", str(signed.bench.registry.location(reference)),
            "--policy", str(signed.write_policy()),
        ],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "signed by builder" in done.stdout
    there = "not checked: pip install" if available() else "there is none"
    assert f"model.sig   {there}" in done.stdout


def test_signing_modules_import_nothing_heavy(environ: dict[str, str]) -> None:
    heavy = {
        "securesystemslib",
        "torch",
        "numpy",
        "boto3",
        "rich",
        "model_signing",
        "sigstore",
        "google",
        "requests",
    }
    script = (
        "import sys\n"
        "import pipeline.registry.signing.command, pipeline.registry.signing.signer\n"
        f"print(sorted({heavy!r} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environ, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_lock_has_the_extra_so_that_its_tests_run() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    for name in ("model-signing", "pyOpenSSL", "securesystemslib", "cryptography"):
        assert f"\n{name}==" in lock
