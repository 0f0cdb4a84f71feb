from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from pipeline.core.errors import AccessError, ConflictError, RecipeError
from pipeline.registry.trust.policy import read_public_key
from pipeline.registry.trust.private_key import (
    KEY_PATH,
    KEY_TEXT,
    parse_private_key,
    read_private_key,
    signing_key,
)
from pipeline.registry.trust.signing import generate_key, require_signing_key, write_key_pair


def test_key_pair_is_written_for_its_owner_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        key = generate_key()
        public = write_key_pair(key, tmp_path / "new" / "ci.key")
    finally:
        os.umask(old)
    assert (tmp_path / "new" / "ci.key").stat().st_mode & 0o777 == 0o600
    assert public == tmp_path / "new" / "ci.key.pub"
    assert read_public_key(public) == key.public
    assert sorted(path.name for path in public.parent.iterdir()) == ["ci.key", "ci.key.pub"]
    assert read_private_key(tmp_path / "new" / "ci.key").public == key.public


@pytest.mark.parametrize("taken", ["ci.key", "ci.key.pub"])
def test_key_pair_replaces_nothing(tmp_path: Path, taken: str) -> None:
    (tmp_path / taken).write_text("precious")
    with pytest.raises(ConflictError, match=taken):
        write_key_pair(generate_key(), tmp_path / "ci.key")
    assert [path.name for path in tmp_path.iterdir()] == [taken]
    assert (tmp_path / taken).read_text() == "precious"


def test_private_key_shows_in_no_message() -> None:
    key = generate_key()
    secret = key.private_pem().decode().splitlines()[1]
    assert secret not in repr(key)
    broken = key.private_pem().replace(b"BEGIN", b"BEGUN")
    with pytest.raises(RecipeError) as caught:
        parse_private_key(broken, KEY_TEXT)
    assert secret not in str(caught.value)
    assert KEY_TEXT in str(caught.value)


def test_only_plain_p256_keys_are_taken() -> None:
    pem, pkcs8 = Encoding.PEM, PrivateFormat.PKCS8
    p384 = ec.generate_private_key(ec.SECP384R1()).private_bytes(pem, pkcs8, NoEncryption())
    ed = ed25519.Ed25519PrivateKey.generate().private_bytes(pem, pkcs8, NoEncryption())
    locked = generate_key().private.private_bytes(pem, pkcs8, BestAvailableEncryption(b"x"))
    for data, reason in ((p384, "P-256"), (ed, "P-256"), (locked, "encrypted"), (b"", "PEM")):
        with pytest.raises(RecipeError, match=reason):
            parse_private_key(data, "key")


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """A configuration folder with a local key, and the environment that names it."""
    write_key_pair(generate_key(), tmp_path / "config" / "local.key")
    return {"ENGINESMITH_CONFIG": str(tmp_path / "config")}


@pytest.mark.parametrize("ci", ["", "0", "false", "1", "TRUE"])
def test_a_given_key_comes_first_and_a_local_one_counts_at_home_only(
    home: dict[str, str], tmp_path: Path, ci: str
) -> None:
    given, text = generate_key(), generate_key()
    write_key_pair(given, tmp_path / "ci.key")
    in_ci = ci not in {"", "0", "false"}
    environ = {**home, "CI": ci}
    by_path = {**environ, KEY_PATH: str(tmp_path / "ci.key")}
    by_text = {**environ, KEY_TEXT: text.private_pem().decode()}
    for local in (True, False):
        for chosen, key in ((by_path, given), (by_text, text)):
            found = signing_key(chosen, local=local)
            assert found is not None
            assert found.public == key.public
        assert (signing_key(environ, local=local) is not None) is (local and not in_ci)
    if in_ci:
        with pytest.raises(RecipeError, match=KEY_PATH):
            require_signing_key(environ, local=True, make=True)


def test_first_build_makes_a_local_key_and_the_next_one_takes_it(tmp_path: Path) -> None:
    environ = {"ENGINESMITH_CONFIG": str(tmp_path / "config")}
    assert signing_key(environ, local=True) is None
    first = require_signing_key(environ, local=True, make=True)
    path = tmp_path / "config" / "local.key"
    assert path.stat().st_mode & 0o777 == 0o600
    assert require_signing_key(environ, local=True).public == first.public
    path.chmod(0o640)
    with pytest.raises(AccessError, match="chmod 600"):
        signing_key(environ, local=True)


def test_two_first_builds_end_with_one_local_key(
    tmp_path: Path, in_children: Callable[[Sequence[Callable[[], object]]], list[int]]
) -> None:
    environ = {"ENGINESMITH_CONFIG": str(tmp_path / "config")}

    def job(number: int) -> Callable[[], object]:
        return lambda: (tmp_path / f"id-{number}").write_text(
            require_signing_key(environ, local=True, make=True).public.keyid
        )

    assert in_children([job(number) for number in range(8)]) == [0] * 8
    assert len({(tmp_path / f"id-{number}").read_text() for number in range(8)}) == 1


def test_a_missing_key_or_two_keys_are_a_usage_fault(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=KEY_TEXT):
        signing_key({KEY_PATH: "/k", KEY_TEXT: "pem"}, local=True)
    with pytest.raises(RecipeError, match=r"nowhere\.key.*enginesmith keygen"):
        signing_key({KEY_PATH: str(tmp_path / "nowhere.key")}, local=True)
    assert not list(tmp_path.iterdir())
