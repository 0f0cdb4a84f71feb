"""Packages signed by whoever an authority certifies, from the policy to the pull."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.core.errors import ExitCode, RecipeError, UntrustedError
from pipeline.core.values import Reference
from pipeline.registry import pull
from pipeline.registry.signing.keys import (
    CERTIFICATE_PATH,
    KEY_PATH,
    generate_key,
    write_key_pair,
)
from pipeline.registry.signing.machine import machine_trust, signatory_for
from pipeline.registry.signing.model_signature import (
    available,
    believed_engine_signature,
    check_engine_signature,
    sign_engine,
)
from pipeline.registry.signing.signer import build_statements
from pipeline.registry.signing.summary import signatures_of
from pipeline.registry.signing.trust import TrustPolicy
from tests.registry.signing.certificates import (
    IDENTITY,
    MAIL,
    Authority,
    authority,
    policy_of,
    self_signed,
)
from tests.registry.signing.conftest import LIGHT_INSTALL, RUN, Signed, trusted

ROOT = Path(__file__).parents[3]
CA = authority()
_policy = functools.partial(policy_of, CA)
needs_extra = pytest.mark.skipif(not available(), reason="the extra `sign` is not installed")


@needs_extra
def test_model_signature_by_a_certificate_is_believed_as_an_envelope_is(signed: Signed) -> None:
    manifest = signed.bench.registry.resolve(str(signed.bench.publish())).manifest
    key = CA.below().signer()
    data = sign_engine(manifest, key)
    assert believed_engine_signature(data, manifest, _policy(), "m").identity == IDENTITY
    by_key = TrustPolicy(keys=(trusted(key, "builds"),))
    assert believed_engine_signature(data, manifest, by_key, "m").identity is None
    _, *rest = manifest["files"]
    with pytest.raises(UntrustedError, match="Signature mismatch"):
        believed_engine_signature(data, {"files": rest}, _policy(), "m")
    for other, policy, reason in (
        (CA.signer(days=(-5, -1)), _policy(), "expired on"),
        (CA.signer(names=(MAIL,)), _policy(), "names email"),
        (authority().signer(), _policy(), "not issued through"),
        (self_signed(), _policy(), "self-signed"),
        (key, _policy("verdicts"), "may not sign builds"),
        (key, TrustPolicy(), "no identities"),
        (generate_key(), _policy(), "shows no certificate"),
        (key, _policy(revoked_keys=(key.public.keyid,)), "revoked"),
    ):
        with pytest.raises(UntrustedError, match=reason):
            believed_engine_signature(sign_engine(manifest, other), manifest, policy, "m")
    # Somebody else's certificate in a bundle that a stranger signed.
    forged = json.loads(sign_engine(manifest, generate_key()))
    forged["verificationMaterial"] = json.loads(data)["verificationMaterial"]
    with pytest.raises(UntrustedError, match="another key signed it"):
        believed_engine_signature(json.dumps(forged).encode(), manifest, _policy(), "m")
    with pytest.raises(UntrustedError):
        check_engine_signature(data, manifest, generate_key().public, "m")


def _publish(signed: Signed, key: Any) -> Reference:
    """As a build does: signed before anybody sees it."""
    with signed.bench.registry.staging() as staging:
        package = signed.bench.seal(staging)
        made: Reference = signed.bench.registry.publish(
            package, build_statements(package, key, RUN)
        )
    signed.accept(made, key)
    return made


def _write_policy(signed: Signed, **more: Any) -> str:
    signed.home.mkdir(exist_ok=True)
    (signed.home / "ca.pem").write_bytes(CA.pem)
    entry = {
        "name": "workflow",
        "certificate_authority_file": "ca.pem",
        "identity": IDENTITY,
        "may_sign": ["builds", "verdicts"],
    }
    path = signed.home / "policy.yaml"
    path.write_text(yaml.safe_dump({"schema": 1, "identities": [entry], **more}))
    return str(path)


def _pull(signed: Signed, reference: Reference, policy: str, name: str = "tiny") -> Any:
    return pull(
        f"tiny@sha256:{reference.digest}",
        to=signed.home / "models" / name,
        registry=str(signed.bench.registry.path),
        gpu="none",
        policy=policy,
    )


def _run(signed: Signed, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if name != "CI" and not name.startswith("ENGINESMITH_")
    }
    config = {"PYTHONPATH": str(ROOT), "ENGINESMITH_CONFIG": str(signed.home / "config")}
    return subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *arguments],
        cwd=signed.home,
        env={**kept, **config, **environ},
        capture_output=True,
        text=True,
        check=False,
    )


def test_package_signed_by_certificate_is_pulled_verified_and_shown(signed: Signed) -> None:
    key = CA.below().signer()
    reference = _publish(signed, key)
    policy = _write_policy(signed)
    pulled = _pull(signed, reference, policy)
    assert (pulled.signer, pulled.signer_keyid) == ("workflow", key.public.keyid)
    assert (pulled.dir / "engine" / "model.sig").exists() == available()
    for target in (str(pulled.dir), str(signed.bench.registry.location(reference))):
        done = _run(signed, "verify", target, "--policy", policy)
        assert done.returncode == 0, done.stderr
        assert f"signed by workflow ({IDENTITY}, key {key.public.keyid[:12]})" in done.stdout
        assert f"signed by workflow ({IDENTITY}," in done.stdout.split("verdict")[1]
        if available():
            assert "model.sig   verified" in done.stdout
        answer = json.loads(_run(signed, "verify", target, "--policy", policy, "--json").stdout)
        wanted = {"name": "workflow", "keyid": key.public.keyid, "identity": IDENTITY}
        assert answer["signer"] == wanted
        assert [found["signer"] for found in answer["verdicts"]] == [wanted]
    registry = ("--registry", str(signed.bench.registry.path))
    shown = _run(signed, "show", str(reference), *registry, ENGINESMITH_POLICY=policy)
    assert shown.returncode == 0, shown.stderr
    assert f"signed by workflow ({IDENTITY}," in " ".join(shown.stdout.split())


def test_package_whose_certificate_expired_is_refused_until_its_key_is_named(
    signed: Signed,
) -> None:
    key = CA.signer(days=(-5, -1))
    reference = _publish(signed, key)
    policy = _write_policy(signed)
    with pytest.raises(UntrustedError, match=r"expired on 20.*name the key itself under keys"):
        _pull(signed, reference, policy)
    assert not (signed.home / "models" / "tiny").exists()
    folder = str(signed.bench.registry.location(reference))
    done = _run(signed, "verify", folder, "--policy", policy)
    assert (done.returncode, "expired on 20" in done.stderr) == (ExitCode.UNTRUSTED, True)
    entry = signed.bench.registry.entry(str(reference))
    told = signatures_of(entry, signed.statements(reference), _policy())
    assert (told.signer, "expired on 20" in told.reason) == (None, True)
    # The way on that the message names: the key out of the envelope, into the policy.
    envelope = next(signed.statements(reference).glob("build-*/manifest.dsse.json"))
    (signed.home / "leaf.pem").write_text(json.loads(envelope.read_text())["signatures"][0]["cert"])
    public = subprocess.run(
        ["openssl", "x509", "-pubkey", "-noout", "-in", signed.home / "leaf.pem"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    entries = [{"name": "last year", "public_key": public, "may_sign": ["builds", "verdicts"]}]
    pulled = _pull(signed, reference, _write_policy(signed, keys=entries))
    assert pulled.signer == "last year"
    assert (pulled.dir / "engine" / "model.sig").exists() == available()


def test_renewed_certificate_of_the_same_key_takes_another_place(signed: Signed) -> None:
    old = CA.signer(days=(-5, -1))
    reference = _publish(signed, old)
    renewed = CA.certify(old)
    signed.sign(reference, renewed)
    signed.accept(reference, renewed, name="test-2")
    done = signed.check(reference, _policy())
    assert done.signer is not None
    assert done.signer.identity == IDENTITY
    assert any("expired on" in reason for reason in done.ignored)
    assert [found.statement for found in done.verdicts] == ["test-2"]


def test_builder_with_a_certificate_is_believed_by_the_identity(signed: Signed) -> None:
    policy = _write_policy(signed)
    key = CA.signer()
    write_key_pair(key, signed.home / "ci.key")
    (signed.home / "ci.crt").write_bytes(key.certificates)
    environ = {
        "ENGINESMITH_POLICY": policy,
        KEY_PATH: str(signed.home / "ci.key"),
        CERTIFICATE_PATH: str(signed.home / "ci.crt"),
    }
    signatory = signatory_for(environ, "run-1", own_folder=False)
    assert signatory.key.certificates == key.certificates
    assert signatory.statement_name("test").startswith(f"test-{key.public.keyid[:12]}-")
    ended = replace(signatory, key=CA.certify(key, days=(-5, -1)))
    reference = signed.bench.publish()
    for sign in (
        lambda: ended.build_statements(signed.bench.registry.resolve(str(reference)), RUN.started),
        lambda: ended.sign_report(signed.bench.report(reference)),
    ):
        with pytest.raises(UntrustedError, match="nothing is signed"):
            sign()
    # Who reads needs no certificate that may sign, not even one that is there.
    (signed.home / "ci.crt").unlink()
    bare = {name: value for name, value in environ.items() if name != "ENGINESMITH_POLICY"}
    assert machine_trust(bare, own_folder=False).keys[0].key == key.public
    with pytest.raises(RecipeError, match=r"ci\.crt"):
        signatory_for(environ, "run-1", own_folder=False)
    del environ[CERTIFICATE_PATH]
    with pytest.raises(UntrustedError, match="not trusted here"):
        signatory_for(environ, "run-1", own_folder=False)


@needs_extra
@pytest.mark.parametrize("issuer", [CA, CA.below()], ids=["root", "intermediate"])
def test_stock_tool_verifies_a_pulled_engine_by_the_authority(
    signed: Signed, issuer: Authority
) -> None:
    key = issuer.signer()
    engine = _pull(signed, _publish(signed, key), _write_policy(signed)).dir / "engine"
    (signed.home / "other.pem").write_bytes(authority().pem)

    def verify(chain: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [
                sys.executable, "-m", "model_signing", "verify", "certificate", str(engine),
                "--signature", str(engine / "model.sig"), "--no-ignore-git-paths",
                "--certificate_chain", str(signed.home / chain),
            ],
            env={**os.environ, "HTTPS_PROXY": "http://127.0.0.1:9"},
            capture_output=True,
            text=True,
            check=False,
        )  # fmt: skip

    bundle = json.loads((engine / "model.sig").read_text())["verificationMaterial"]
    assert len(bundle["x509CertificateChain"]["certificates"]) == 1 + len(issuer.above)
    done = verify("ca.pem")
    assert (done.returncode, "succeeded" in done.stdout) == (0, True), done.stdout + done.stderr
    assert verify("other.pem").returncode == 1
    plan = engine / "model.plan"
    plan.chmod(0o644)
    plan.write_bytes(b"evil" + plan.read_bytes()[4:])
    assert verify("ca.pem").returncode == 1


def test_light_install_verifies_certificates(signed: Signed) -> None:
    folder = str(signed.bench.registry.location(_publish(signed, CA.signer())))
    done = subprocess.run(
        [sys.executable, "-c", LIGHT_INSTALL, "verify", folder, "--policy", _write_policy(signed)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "ENGINESMITH_CONFIG": str(signed.home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"signed by workflow ({IDENTITY}," in done.stdout
