"""The policy about whoever an authority certifies; packages: test_certified_packages.py."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from pipeline.core.errors import ExitCode, RecipeError, UntrustedError
from pipeline.core.values import Reference
from pipeline.registry.lifecycle.records import Move, read_move, sign_record
from pipeline.registry.signing.envelope import MANIFEST_TYPE, parse_envelope, sign_envelope
from pipeline.registry.signing.keys import (
    CERTIFICATE_PATH,
    KEY_PATH,
    SigningKey,
    choose_key,
    generate_key,
    load_key,
    write_key_pair,
)
from pipeline.registry.signing.policy_file import load_policy
from pipeline.registry.signing.trust import Role, TrustPolicy
from tests.registry.signing.certificates import (
    IDENTITY,
    MAIL,
    URI,
    Authority,
    authority,
    policy_of,
    self_signed,
)
from tests.registry.signing.conftest import trusted

ROOT = Path(__file__).parents[3]
CA = authority()
_policy = functools.partial(policy_of, CA)


def _sign(key: Any, policy: TrustPolicy, role: Role = "builds") -> Any:
    """Who is believed to have signed something with this key."""
    envelope = parse_envelope(sign_envelope(b"x", MANIFEST_TYPE, key), "it")
    return policy.signer(envelope, role, "it")


def test_holder_of_the_certified_name_is_believed_with_any_key() -> None:
    for key in (CA.signer(), CA.signer(), CA.below().signer()):
        found = _sign(key, _policy())
        assert (found.name, found.identity, found.key) == ("workflow", IDENTITY, key.public)
        _policy().require_may(key.public, "builds")


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        (generate_key(), r"not trusted here; if you know whose it is, name it"),
        (self_signed(), r"its certificate names URI.*but is self-signed.*authority CN=team CA"),
        (authority().signer(), r"but is by CN=team CA, .*not issued through"),
        (CA.signer(names=(MAIL,)), rf"names email:ci@example.org, .* believes {IDENTITY} only"),
        (
            CA.signer(names=(x509.UniformResourceIdentifier(URI + "2"),)),
            r"engines2, and the policy",
        ),
        (CA.signer(names=(x509.UniformResourceIdentifier(URI[:-1]),)), r"engine, and the policy"),
        (CA.signer(names=(x509.DNSName(URI),)), r"names DNS:https.*, and the policy"),
        (CA.signer(names=(), common_name=URI), r"no subjectAltName, and the common name"),
        (CA.signer(ca=True), r"an authority's \(CA:TRUE\)"),
        (authority().signer(days=(-5, -1)), r"not issued through"),
        (CA.signer(days=(-5, -1)), r"expired on 20.*clock says 20.*name the key itself under keys"),
        (CA.signer(days=(1, 5)), r"valid from 20.*set the clock"),
        (replace(CA.signer(), certificates=b"-----BEGIN nothing"), r"cannot be read: wanted PEM"),
        (replace(CA.signer(), certificates=b"x" * 20_000), r"20000 bytes .* at most 16384"),
        (replace(generate_key(), certificates=CA.signer().certificates), r"is for another key"),
    ],
)
def test_everybody_else_is_refused_with_what_was_found_and_wanted(key: Any, reason: str) -> None:
    with pytest.raises(UntrustedError, match=reason) as caught:
        _sign(key, _policy())
    assert caught.value.exit_code == ExitCode.UNTRUSTED
    with pytest.raises(UntrustedError, match=reason):
        _policy().require_may(key.public, "builds")


def test_the_key_of_a_stolen_certificate_is_needed_too() -> None:
    forged = json.loads(sign_envelope(b"x", MANIFEST_TYPE, generate_key()))
    real = CA.signer()
    forged["signatures"][0].update(keyid=real.public.keyid, cert=real.certificates.decode())
    with pytest.raises(UntrustedError, match="does not match its content"):
        _policy().signer(parse_envelope(json.dumps(forged).encode(), "it"), "builds", "it")


def test_identity_may_sign_what_the_policy_says_and_nothing_else() -> None:
    key = CA.signer()
    assert _sign(key, _policy("verdicts"), "verdicts").identity == IDENTITY
    with pytest.raises(UntrustedError, match="may not sign builds, only verdicts"):
        _sign(key, _policy("verdicts"))
    # Channels as with keys: everybody's until somebody has it.
    assert _sign(key, _policy("verdicts"), "channels")
    other = TrustPolicy(
        keys=(trusted(generate_key(), "channels"),), identities=_policy("builds").identities
    )
    with pytest.raises(UntrustedError, match="may not sign channels"):
        _sign(key, other, "channels")
    mail = CA.trusted("channels", identity="email:ci@example.org")
    both = TrustPolicy(identities=(CA.trusted("builds"), mail))
    with pytest.raises(UntrustedError, match="may not sign channels"):
        _sign(key, both, "channels")
    assert _sign(CA.signer(names=(MAIL,)), both, "channels").identity == "email:ci@example.org"


def test_revoked_keys_count_for_leaves_and_for_authorities() -> None:
    between = CA.below()
    key = between.signer()
    chain = [key.public.keyid, _keyid(between), _keyid(CA)]
    for keyid in (*chain, f"sha256:{chain[0]}"):
        with pytest.raises(UntrustedError, match=r"revoked"):
            _sign(key, _policy(revoked_keys=(keyid,)))
    assert _sign(key, _policy(revoked_keys=("0" * 64,)))


def _keyid(of: Authority) -> str:
    der = of.key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def test_what_only_forbids_may_be_signed_by_a_certificate_that_expired() -> None:
    def judge(key: SigningKey, **more: Any) -> Any:
        envelope = parse_envelope(sign_envelope(b"x", MANIFEST_TYPE, key), "it")
        return _policy("channels", **more).signer(envelope, "channels", "it", expired_too=True)

    old = CA.signer(days=(-5, -1))
    assert judge(old).identity == judge(CA.signer()).identity == IDENTITY
    for key, revoked in (
        (CA.signer(days=(1, 5)), "0" * 64),
        (authority().signer(days=(-5, -1)), "0" * 64),
        (old, old.public.keyid),
    ):
        with pytest.raises(UntrustedError):
            judge(key, revoked_keys=(revoked,))


def test_key_that_the_policy_names_needs_no_valid_certificate() -> None:
    expired = CA.signer(days=(-5, -1))
    policy = TrustPolicy(keys=(trusted(expired, "builds"),))
    assert _sign(expired, policy).identity is None
    with pytest.raises(UntrustedError, match=r"may not sign verdicts, only builds; its cert.*keys"):
        _sign(expired, policy, "verdicts")
    both = replace(policy, identities=(CA.trusted("verdicts"),))
    valid = CA.certify(expired)
    assert _sign(valid, both, "verdicts").identity == IDENTITY


def test_two_authorities_may_certify_one_name_while_one_replaces_the_other() -> None:
    new = authority(name="new CA")
    policy = TrustPolicy(identities=(CA.trusted("builds"), new.trusted("builds", name="new")))
    assert _sign(CA.signer(), policy).name == "workflow"
    assert _sign(new.signer(), policy).name == "new"
    with pytest.raises(UntrustedError, match=r"authority CN=team CA.*authority CN=new CA"):
        _sign(authority().signer(), policy)


def test_policy_names_identities_by_file_or_inline(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_bytes(CA.pem)
    entry = {"name": "workflow", "identity": IDENTITY, "may_sign": ["builds", "verdicts"]}
    path = tmp_path / "policy.yaml"
    for more in (
        {"certificate_authority_file": "ca.pem"},
        {"certificate_authority": CA.pem.decode()},
    ):
        path.write_text(yaml.safe_dump({"schema": 1, "identities": [{**entry, **more}]}))
        assert load_policy(path) == _policy()


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"identity": URI}, "is not URI:…, email:… or DNS:…"),
        ({"identity": "URI:https://ci.example/*"}, "there are no patterns"),
        ({"identity": "DNS:*.example"}, "there are no patterns"),
        ({"identity": "IP:10.0.0.1"}, "is not URI"),
        ({"identity": "DNS:"}, "is not URI"),
        ({"certificate_authority": "nonsense"}, "cannot be read"),
        ({"certificate_authority": CA.signer().certificates.decode()}, "is not an authority's"),
        ({"certificate_authority_file": "gone.pem"}, r"gone\.pem"),
        (
            {"certificate_authority_file": "ca.pem", "certificate_authority": "x"},
            "unexpected|Unexp",
        ),
        ({"may_sign": ["all"]}, "builds"),
        ({"issuer": "x"}, "issuer"),
    ],
)
def test_policy_with_a_faulty_identity_is_refused_whole(
    tmp_path: Path, entry: dict[str, Any], reason: str
) -> None:
    whole = {"name": "x", "identity": IDENTITY, "may_sign": ["builds"], **entry}
    if not any(name.startswith("certificate") for name in entry):
        whole["certificate_authority"] = CA.pem.decode()
    path = tmp_path / "policy.yaml"
    path.write_text(yaml.safe_dump({"schema": 1, "identities": [whole]}))
    with pytest.raises(RecipeError, match=reason):
        load_policy(path)


def test_one_identity_of_one_authority_is_named_once() -> None:
    with pytest.raises(ValueError, match="there twice"):
        TrustPolicy(identities=(CA.trusted("builds"), CA.trusted("verdicts", name="again")))


def test_moves_of_channels_carry_the_certificate_too() -> None:
    move = Move(
        channel="stable",
        card="NVIDIA-L4",
        reference=Reference(name="tiny", variant="v", version="1", digest="d" * 64),
        seq=1,
        prev=None,
        actor="ada",
        reason="",
        at="2026-11-25T09:00:00Z",
    )
    data = sign_record(move, CA.signer())
    assert read_move(data, _policy("channels"), "move").signer == "workflow"
    with pytest.raises(UntrustedError, match="expired on"):
        read_move(sign_record(move, CA.signer(days=(-5, -1))), _policy("channels"), "move")


def test_commands_of_the_documentation_make_what_is_believed(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "trust.md").read_text()
    section = text.split("## An authority for a test")[1]
    script = section.split("```sh\n")[1].split("```")[0]
    policy = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    command = f'enginesmith() {{ "{sys.executable}" -m pipeline.cli "$@"; }}\n'
    made = subprocess.run(
        ["bash", "-e", "-c", command + script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    environ = {KEY_PATH: str(tmp_path / "ci.key"), CERTIFICATE_PATH: str(tmp_path / "ci.crt")}
    key = load_key(choose_key(environ), environ)
    write_key_pair(generate_key(), tmp_path / "release")
    (tmp_path / "policy.yaml").write_text(yaml.safe_dump(policy))
    found = _sign(key, load_policy(tmp_path / "policy.yaml"))
    assert (found.name, found.identity) == ("release workflow", IDENTITY)
