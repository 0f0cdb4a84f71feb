"""Certificates by themselves, and the signer's own."""

from __future__ import annotations

import itertools
import json
import subprocess
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from pipeline.core.errors import ExitCode, RecipeError, UntrustedError
from pipeline.registry.signing.certificate import (
    MAX_CHAIN_BYTES,
    CertificateError,
    ExpiredError,
    parse_authority,
    parse_chain,
    pem_of,
    require_current,
    require_issued,
    require_may_still_sign,
)
from pipeline.registry.signing.envelope import MANIFEST_TYPE, parse_envelope, sign_envelope
from pipeline.registry.signing.keys import (
    CERTIFICATE_PATH,
    KEY_PATH,
    KEY_TEXT,
    SigningKey,
    choose_key,
    generate_key,
    load_key,
    write_key_pair,
)
from tests.registry.signing.certificates import (
    IDENTITY,
    NAMES,
    URI,
    authority,
    pem,
    self_signed,
)

CA = authority()
NOW = datetime.now(UTC)
MAIL, HOST = x509.RFC822Name("ci@example.org"), x509.DNSName("ci.example.org")


@pytest.mark.parametrize(
    ("name", "identity"),
    [(NAMES[0], IDENTITY), (MAIL, "email:ci@example.org"), (HOST, "DNS:ci.example.org")],
)
def test_identity_is_the_one_name_as_openssl_prints_it(
    name: x509.GeneralName, identity: str, tmp_path: Path
) -> None:
    key = CA.signer(names=(name,))
    chain = parse_chain(key.certificates)
    assert (chain.identity, chain.key, chain.intermediates) == (identity, key.public, ())
    (tmp_path / "leaf.pem").write_bytes(key.certificates)
    shown = subprocess.run(
        ["openssl", "x509", "-noout", "-ext", "subjectAltName", "-in", tmp_path / "leaf.pem"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert identity in shown.split()


def _leaf(**more: Any) -> bytes:
    return CA.signer(**more).certificates


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "cannot be read"),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "cannot be read"),
        (generate_key().public.pem, "cannot be read"),
        (b" " * MAX_CHAIN_BYTES + _leaf(), "at most 16384"),
        (_leaf() + 4 * CA.pem, "4 more; at most 3"),
        (CA.pem, "wanted ECDSA P-256"),
        (
            pem(CA.issue(ec.generate_private_key(ec.SECP384R1()).public_key())),
            "kind secp384r1, wanted ECDSA P-256",
        ),
        (
            pem(CA.issue(rsa.generate_private_key(65537, 2048).public_key())),
            "RSAPublicKey, wanted ECDSA P-256",
        ),
        (_leaf(ca=True), "an authority's"),
        (_leaf(names=(), common_name=URI), f"CN={URI} has no subjectAltName, and the common name"),
        (_leaf(names=(*NAMES, MAIL)), "names URI:.*, email:.*; wanted exactly one"),
        (_leaf(names=(x509.DirectoryName(CA.certificate.subject),)), "wanted exactly one"),
        (_leaf(usage=None), "lacks keyUsage digitalSignature"),
        (_leaf(usage=False), "lacks keyUsage digitalSignature"),
        (_leaf(extended=(ExtendedKeyUsageOID.CLIENT_AUTH,)), "without codeSigning"),
        (_leaf(names=(x509.UniformResourceIdentifier("a:b\n\x1b[2J"),)), "unprintable"),
    ],
)
def test_leaf_that_may_not_sign_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(CertificateError, match=reason) as caught:
        parse_chain(data)
    assert str(caught.value).isprintable()


def test_leaf_without_extended_usages_may_sign() -> None:
    assert parse_chain(_leaf(extended=())).identity == IDENTITY
    usages = (ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.CODE_SIGNING)
    assert parse_chain(_leaf(extended=usages)).identity == IDENTITY


def test_only_certificates_travel_and_no_key_that_lies_beside_them_in_the_file() -> None:
    key = CA.signer()
    chain = parse_chain(key.private_pem() + key.certificates)
    assert chain.key.certificates == key.certificates
    assert b"PRIVATE" not in chain.key.certificates


def test_authority_stands_behind_a_chain_with_intermediates() -> None:
    between = CA.below().below(name="second")
    key = between.signer()
    chain = parse_chain(key.certificates)
    assert len(chain.intermediates) == 2
    first, *above = require_issued(chain, CA.certificate, NOW)
    assert first == key.public
    assert len(above) == 3
    # An intermediate authority can be the one that is believed.
    assert require_issued(parse_chain(key.certificates), between.certificate, NOW)
    # A root that travels along does no harm, and no good.
    other = authority(name="other")
    whole = parse_chain(key.certificates + CA.pem)
    assert require_issued(whole, CA.certificate, NOW)
    with pytest.raises(CertificateError, match="not issued through"):
        require_issued(whole, other.certificate, NOW)


def _long() -> SigningKey:
    return CA.below(name="1").below(name="2").below(name="3").below(name="4").signer()


@pytest.mark.parametrize(
    ("key", "root", "reason"),
    [
        (self_signed(), CA, "is self-signed, comes with 0 intermediate ones"),
        (authority(name="team CA").signer(), CA, "by CN=team CA, .* not issued through"),
        (replace(CA.below(), above=()).signer(), CA, "by CN=between, comes with 0 intermediate"),
        (_long(), CA, "comes with 4 more"),
        ((root := authority(path_length=0)).below().signer(), root, "path length"),
        (CA.below(path_length=0).below(name="second").signer(), CA, "path length"),
        ((old := authority(days=(-9, -2))).signer(days=(-5, 5)), old, "to 20.*not valid at"),
        (CA.below(days=(-9, -2)).signer(days=(-5, 5)), CA, "not valid at"),
    ],
)
def test_chain_that_does_not_lead_to_the_authority_is_refused(
    key: SigningKey, root: Any, reason: str
) -> None:
    with pytest.raises(CertificateError, match=reason):
        require_issued(parse_chain(key.certificates), root.certificate, NOW)


def test_leaf_of_a_leaf_is_refused() -> None:
    holder = CA.signer()
    leaf = parse_chain(holder.certificates).leaf
    forger = replace(CA, key=holder.private, certificate=leaf, above=(leaf,))
    with pytest.raises(CertificateError, match="not issued through"):
        require_issued(parse_chain(forger.signer().certificates), CA.certificate, NOW)


def test_dates_are_exact_and_a_forged_old_certificate_is_not_called_expired() -> None:
    chain = parse_chain(CA.signer(days=(-5, 5)).certificates)
    begin, end = chain.leaf.not_valid_before_utc, chain.leaf.not_valid_after_utc
    second = timedelta(seconds=1)
    require_current(chain.leaf, begin)
    require_current(chain.leaf, end)
    with pytest.raises(ExpiredError, match=f"expired on {end:%Y-%m-%d}.*clock says"):
        require_current(chain.leaf, end + second)
    with pytest.raises(CertificateError, match=r"valid from 20.* on, .*clock says 20.*set the"):
        require_current(chain.leaf, begin - second)
    # Whom it names is told apart from whether it is too old or too new.
    for now in (begin - second, end + second):
        assert require_issued(chain, CA.certificate, now)
        with pytest.raises(CertificateError, match="not issued through"):
            require_issued(chain, authority(name="team CA").certificate, now)


def test_damage_at_any_byte_is_refused_and_ends_nothing() -> None:
    key = CA.below().signer()
    chain = parse_chain(key.certificates)
    whole = (chain.leaf, *chain.intermediates)
    accepted = 0
    for place, certificate in enumerate(whole):
        der = certificate.public_bytes(Encoding.DER)
        for at, bit in itertools.product(range(len(der)), (1, 128)):
            parts = [pem(one) for one in whole]
            parts[place] = pem_of(der[:at] + bytes([der[at] ^ bit]) + der[at + 1 :])
            try:
                damaged = parse_chain(b"".join(parts))
                require_issued(damaged, CA.certificate, NOW)
            except CertificateError:
                continue
            # Of the octet that counts the unused bits of a signature, DER readers allow two values.
            found = (damaged.leaf, *damaged.intermediates)
            assert [one.tbs_certificate_bytes for one in found] == [
                one.tbs_certificate_bytes for one in whole
            ]
            accepted += 1
    assert accepted <= len(whole)


def test_authority_is_one_certificate_that_may_issue() -> None:
    assert parse_authority(CA.pem) == CA.certificate
    for data, reason in (
        (_leaf(), "not an authority's"),
        (CA.pem + CA.pem, "one of 2"),
        (b"no", "cannot be read"),
    ):
        with pytest.raises(CertificateError, match=reason):
            parse_authority(data)


def test_certificate_travels_in_the_envelope_and_other_readers_pass_it_by() -> None:
    from securesystemslib.dsse import Envelope as Stock
    from securesystemslib.signer import SSlibKey

    bare = generate_key()
    key = CA.below().certify(bare)
    data = sign_envelope(b"x", MANIFEST_TYPE, key)
    assert parse_envelope(data, "x").certificates == {key.public.keyid: key.certificates}
    stock = SSlibKey.from_crypto(key.private.public_key(), keyid=key.public.keyid)
    assert Stock.from_dict(json.loads(data)).verify([stock], 1)
    # Without a certificate nothing changes, not by a byte.
    value = json.loads(data)
    del value["signatures"][0]["cert"]
    plain = sign_envelope(b"x", MANIFEST_TYPE, bare)
    assert set(json.loads(plain)["signatures"][0]) == {"keyid", "sig"}
    assert json.loads(plain)["payload"] == value["payload"]
    value["signatures"][0]["cert"] = {"not": "ours"}
    assert parse_envelope(json.dumps(value).encode(), "x").certificates == {}


@pytest.fixture
def signing(tmp_path: Path) -> dict[str, str]:
    """An environment with a key in `ci.key`; `ci.crt` is named and not there yet."""
    write_key_pair(generate_key(), tmp_path / "ci.key")
    return {KEY_PATH: str(tmp_path / "ci.key"), CERTIFICATE_PATH: str(tmp_path / "ci.crt")}


def _certify(environ: dict[str, str], **more: Any) -> SigningKey:
    bare = load_key(choose_key(environ), environ, certified=False)
    key = CA.certify(bare, **more)
    Path(environ[CERTIFICATE_PATH]).write_bytes(key.certificates)
    return key


def test_signer_takes_the_certificate_that_the_environment_names(signing: dict[str, str]) -> None:
    key = _certify(signing)
    loaded = load_key(choose_key(signing), signing)
    assert loaded.public.certificates == key.certificates
    text = {KEY_TEXT: key.private_pem().decode(), CERTIFICATE_PATH: signing[CERTIFICATE_PATH]}
    assert load_key(choose_key(text), text).certificates == key.certificates
    # What is renewed takes another name in the registry; what is not certified keeps its own.
    assert _certify(signing).label != key.label
    assert key.label.startswith(f"{key.public.keyid[:12]}-")
    assert replace(key, certificates=b"").label == key.public.keyid[:12]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"days": (-5, -1)}, "expired on 20"),
        ({"days": (1, 5)}, "set the clock"),
        ({"ca": True}, "an authority's"),
        ({"names": ()}, "no subjectAltName"),
        ({"usage": None}, "digitalSignature"),
    ],
)
def test_signer_with_an_unusable_certificate_is_stopped_at_once(
    signing: dict[str, str], more: dict[str, Any], reason: str
) -> None:
    _certify(signing, **more)
    with pytest.raises(RecipeError, match=reason) as caught:
        load_key(choose_key(signing), signing)
    assert caught.value.exit_code == ExitCode.USAGE
    assert CERTIFICATE_PATH in str(caught.value)
    # Who only reads needs no certificate.
    assert load_key(choose_key(signing), signing, certified=False).certificates == b""


def test_certificate_of_another_key_a_missing_and_a_local_one_are_usage_faults(
    signing: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"ci\.crt"):
        load_key(choose_key(signing), signing)
    Path(signing[CERTIFICATE_PATH]).write_bytes(CA.signer().certificates)
    with pytest.raises(RecipeError, match=r"is for key .*, and ENGINESMITH_SIGNING_KEY is key"):
        load_key(choose_key(signing), signing)
    Path(signing[CERTIFICATE_PATH]).write_text("nonsense")
    with pytest.raises(RecipeError, match="cannot be read: wanted PEM"):
        load_key(choose_key(signing), signing)
    local = {"ENGINESMITH_CONFIG": str(tmp_path), CERTIFICATE_PATH: signing[CERTIFICATE_PATH]}
    with pytest.raises(RecipeError, match="set ENGINESMITH_SIGNING_KEY"):
        load_key(choose_key(local), local)


def test_certificate_that_ends_during_a_build_signs_nothing() -> None:
    require_may_still_sign(generate_key())
    require_may_still_sign(CA.signer())
    with pytest.raises(UntrustedError, match=r"nothing is signed, .* expired on"):
        require_may_still_sign(CA.signer(days=(-5, -1)))
