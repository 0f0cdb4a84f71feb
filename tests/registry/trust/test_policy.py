from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.core.errors import RecipeError, UntrustedError
from pipeline.registry.trust.policy import TrustedKey, TrustPolicy, load_policy
from pipeline.registry.trust.signing import generate_key, sign_envelope
from pipeline.registry.trust.statements import parse_envelope, signer_of

KEY = generate_key()
PEM = KEY.public.pem.decode()


def _write(folder: Path, value: Any) -> Path:
    path = folder / "policy.yaml"
    path.write_text(value if isinstance(value, str) else yaml.safe_dump(value))
    return path


def test_policy_is_read_from_yaml_and_json(tmp_path: Path) -> None:
    inline = {"name": "ci", "public_key": PEM, "may_sign": ["builds"]}
    wanted = TrustPolicy(keys=(TrustedKey(name="ci", public_key=PEM, may_sign=("builds",)),))
    assert load_policy(_write(tmp_path, {"schema": 1, "keys": [inline]})) == wanted
    assert load_policy(_write(tmp_path, json.dumps({"schema": 1, "keys": [inline]}))) == wanted
    assert wanted.keys[0].key == KEY.public


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"schema": 2}, "schema"),
        ({"schema": 1, "revoked_digests": ["sha256:" + "A" * 64]}, "revoked_digests.0"),
        ({"schema": 1, "keys": [{"name": "x", "public_key": "no", "may_sign": []}]}, "PEM"),
        (
            {"schema": 1, "keys": [{"name": n, "public_key": PEM, "may_sign": []} for n in "xy"]},
            "twice",
        ),
        (f"schema: 1\nrevoked_keys: [{'a' * 64}]\nrevoked_keys: []\n", "twice"),
        ("schema: 1\nkeys: &all [*all]\n", "not a policy"),
        ("!!python/object/apply:os.getcwd []", "not a policy"),
    ],
)
def test_policy_with_a_fault_is_refused_whole(tmp_path: Path, value: Any, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        load_policy(_write(tmp_path, value))


OURS = TrustPolicy(keys=(TrustedKey(name="ci", public_key=PEM, may_sign=("builds",)),))


def signer(value: Any) -> str:
    return signer_of(parse_envelope(json.dumps(value).encode()), OURS, "builds").name


def test_one_good_signature_of_several_is_enough() -> None:
    ours = json.loads(sign_envelope(b"x", KEY))
    other = json.loads(sign_envelope(b"x", generate_key()))
    assert signer({**ours, "signatures": [*other["signatures"], *ours["signatures"]]}) == "ci"
    with pytest.raises(UntrustedError, match="not trusted here"):
        signer(other)


def test_a_keyid_that_is_no_text_is_untrusted() -> None:
    value = json.loads(sign_envelope(b"x", KEY))
    value["signatures"][0]["keyid"] = 1
    with pytest.raises(UntrustedError, match="not a DSSE envelope"):
        signer(value)
