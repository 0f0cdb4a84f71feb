from __future__ import annotations

import hashlib
import os
import subprocess
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
from pipeline.registry.trust.keys import (
    KEY_PATH,
    KEY_TEXT,
    KeyChoice,
    choose_key,
    config_root,
    generate_key,
    load_key,
    parse_private_key,
    read_public_key,
    write_key_pair,
)


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
    loaded = load_key(KeyChoice(kind="file", path=tmp_path / "new" / "ci.key"), {})
    assert loaded.public == key.public


@pytest.mark.parametrize("taken", ["ci.key", "ci.key.pub"])
def test_key_pair_replaces_nothing(tmp_path: Path, taken: str) -> None:
    (tmp_path / taken).write_text("precious")
    with pytest.raises(ConflictError, match=taken):
        write_key_pair(generate_key(), tmp_path / "ci.key")
    assert [path.name for path in tmp_path.iterdir()] == [taken]
    assert (tmp_path / taken).read_text() == "precious"


def test_key_id_is_what_openssl_says(tmp_path: Path) -> None:
    key = generate_key()
    public = write_key_pair(key, tmp_path / "ci.key")
    der = subprocess.run(
        ["openssl", "pkey", "-pubin", "-in", public, "-outform", "DER"],
        capture_output=True,
        check=True,
    ).stdout
    assert key.public.keyid == hashlib.sha256(der).hexdigest()


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


@pytest.mark.parametrize(
    ("environ", "path", "wanted"),
    [
        ({}, None, KeyChoice(kind="local", path=Path("/c/local.key"))),
        ({"CI": ""}, None, KeyChoice(kind="local", path=Path("/c/local.key"))),
        ({"CI": "false"}, None, KeyChoice(kind="local", path=Path("/c/local.key"))),
        ({KEY_PATH: "/k"}, None, KeyChoice(kind="file", path=Path("/k"))),
        ({KEY_TEXT: "pem"}, None, KeyChoice(kind="environment")),
        ({KEY_PATH: "/k"}, Path("/o"), KeyChoice(kind="file", path=Path("/o"))),
        ({"CI": "true", KEY_PATH: "/k"}, None, KeyChoice(kind="file", path=Path("/k"))),
        ({"CI": "1", KEY_TEXT: "pem"}, None, KeyChoice(kind="environment")),
        ({"CI": "true"}, Path("/o"), KeyChoice(kind="file", path=Path("/o"))),
    ],
)
def test_explicit_key_comes_first_and_a_local_one_last(
    environ: dict[str, str], path: Path | None, wanted: KeyChoice
) -> None:
    assert choose_key({"ENGINESMITH_CONFIG": "/c", **environ}, path) == wanted


@pytest.mark.parametrize("value", ["true", "1", "yes", "TRUE"])
def test_ci_must_be_given_a_key(value: str) -> None:
    with pytest.raises(RecipeError, match=KEY_PATH):
        choose_key({"CI": value})


def test_two_keys_in_the_environment_are_refused() -> None:
    with pytest.raises(RecipeError, match=KEY_TEXT):
        choose_key({KEY_PATH: "/k", KEY_TEXT: "pem"})


def test_configuration_folder_is_not_the_cache() -> None:
    assert config_root({"XDG_CONFIG_HOME": "/x"}) == Path("/x/enginesmith")
    assert config_root({"ENGINESMITH_CONFIG": "/y", "XDG_CONFIG_HOME": "/x"}) == Path("/y")
    assert config_root({"ENGINESMITH_CACHE": "/z"}) == Path.home() / ".config" / "enginesmith"


def test_first_build_makes_a_local_key_and_the_next_one_takes_it(tmp_path: Path) -> None:
    environ = {"ENGINESMITH_CONFIG": str(tmp_path / "config")}
    choice = choose_key(environ)
    first = load_key(choice, environ)
    assert choice.path is not None
    assert choice.path.stat().st_mode & 0o777 == 0o600
    assert load_key(choice, environ).public == first.public
    choice.path.chmod(0o640)
    with pytest.raises(AccessError, match="chmod 600"):
        load_key(choice, environ)


def test_two_first_builds_end_with_one_local_key(
    tmp_path: Path, in_children: Callable[[Sequence[Callable[[], object]]], list[int]]
) -> None:
    environ = {"ENGINESMITH_CONFIG": str(tmp_path / "config")}

    def job(number: int) -> Callable[[], object]:
        return lambda: (tmp_path / f"id-{number}").write_text(
            load_key(choose_key(environ), environ).public.keyid
        )

    assert in_children([job(number) for number in range(8)]) == [0] * 8
    assert len({(tmp_path / f"id-{number}").read_text() for number in range(8)}) == 1


def test_key_from_the_environment_is_read(tmp_path: Path) -> None:
    key = generate_key()
    environ = {KEY_TEXT: key.private_pem().decode()}
    assert load_key(choose_key(environ), environ).public == key.public


def test_missing_key_file_is_a_usage_fault(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nowhere\.key"):
        load_key(KeyChoice(kind="file", path=tmp_path / "nowhere.key"), {})
    with pytest.raises(RecipeError, match=r"local\.key"):
        load_key(KeyChoice(kind="local", path=tmp_path / "local.key"), {}, make=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("which", ["ci.key", "ci.key.pub"])
def test_a_key_that_others_may_replace_is_refused(tmp_path: Path, which: str) -> None:
    write_key_pair(generate_key(), tmp_path / "ci.key")
    (tmp_path / which).chmod(0o662)

    def load() -> object:
        if which.endswith(".pub"):
            return read_public_key(tmp_path / which)
        return load_key(KeyChoice(kind="file", path=tmp_path / which), {})

    with pytest.raises(AccessError, match="chmod go-w"):
        load()
    (tmp_path / which).chmod(0o644)
    load()
