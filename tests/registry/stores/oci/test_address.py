"""URLs, tags, credentials: no network."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from pipeline.core.errors import AccessError, RecipeError
from pipeline.registry.store import Place
from pipeline.registry.stores.oci.address import (
    move_tag,
    parse_address,
    parse_statement_tag,
    parse_version_tag,
    statement_tag,
    version_tag,
)
from pipeline.registry.stores.oci.login import Credentials, find_credentials
from pipeline.registry.stores.oci.registry import OciRegistry
from pipeline.registry.stores.oci.transport import Transport
from pipeline.registry.stores.oci.writing import channel_tag


@pytest.mark.parametrize(
    ("url", "api", "repository"),
    [
        ("oci://ghcr.io/us/engines", "https://ghcr.io", "us/engines/phi3"),
        ("oci://registry.lan:5000/engines/", "https://registry.lan:5000", "engines/phi3"),
        ("oci://localhost:5000/a__b/c-d.e", "http://localhost:5000", "a__b/c-d.e/phi3"),
        ("oci://127.0.0.1/a", "http://127.0.0.1", "a/phi3"),
        ("oci://[::1]:5000/a", "http://[::1]:5000", "a/phi3"),
        ("oci://localhost:5000", "http://localhost:5000", "phi3"),
        ("oci://docker.io/us", "https://registry-1.docker.io", "us/phi3"),
        ("oci://localhost.evil.example/a", "https://localhost.evil.example", "a/phi3"),
    ],
)
def test_a_url_names_a_registry_and_its_repositories(url: str, api: str, repository: str) -> None:
    address = parse_address(url)
    assert (address.api, address.repository("phi3")) == (api, repository)
    assert address.name_of(repository) == "phi3"
    assert (address.name_of(f"x{repository}") is None) == bool(address.prefix)
    assert address.name_of(f"{repository}/deeper") is None


@pytest.mark.parametrize(
    "url",
    ["oci://", "oci:///a", "https://ghcr.io/a", "oci://ghcr.io:port/a", "oci://h/" + "a" * 250]
    + [f"oci://ghcr.io/{path}" for path in ("Upper", "a//b", "../a", "a:tag", "a?x=1", "a#b")],
)
def test_what_is_no_such_url_is_refused_before_anything_is_asked(url: str) -> None:
    with pytest.raises(RecipeError):
        OciRegistry(url=url)


LONG = "a" * 64


def test_every_tag_fits_and_means_one_thing() -> None:
    version = f"1{'a' * 40}-01234567-0123456789ab"
    place = Place(name="tiny", variant=LONG, version=version)
    tags = [
        version_tag(place),
        statement_tag(place, "provenance-0123456789abcdef"),
        move_tag(LONG, "0" * 64),
        channel_tag(LONG, "c" * 32, "C" * 64),
        channel_tag(LONG, "c" * 32, "D" * 64),
        channel_tag("any", "move", "L4"),
    ]
    assert max(map(len, tags)) == 128
    assert len(set(tags)) == len(tags)
    assert [parse_version_tag("tiny", tag) for tag in tags] == [place, *[None] * 5]
    assert [parse_statement_tag(tag) is not None for tag in tags] == [False, True, *[False] * 4]
    assert channel_tag("any", "stable", "NVIDIA-L4") == "any_stable.NVIDIA-L4"


def test_credentials_come_from_the_environment_before_docker(tmp_path: Path) -> None:
    auth = base64.b64encode(b"bob:pass:word").decode()
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"auths": {"h:1": {"auth": auth}, "https://index.docker.io/v1/": {"auth": auth}}}
        )
    )
    environ = {"DOCKER_CONFIG": str(tmp_path)}
    expected = Credentials(username="bob", password="pass:word")
    assert find_credentials("h:1", environ) == expected
    assert find_credentials("docker.io", environ) == expected
    assert find_credentials("h", environ) is None
    assert find_credentials("h", {"HOME": str(tmp_path / "nobody")}) is None
    environ |= {"ENGINESMITH_OCI_USERNAME": "eve", "ENGINESMITH_OCI_PASSWORD": "x"}
    assert find_credentials("h:1", environ) == expected  # they are for no host yet
    environ["ENGINESMITH_OCI_HOST"] = "h:1"
    assert find_credentials("h:1", environ) == Credentials(username="eve", password="x")
    assert find_credentials("other:1", environ) is None
    assert "pass:word" not in repr(expected)


@pytest.mark.parametrize(
    ("api", "realm"),
    [
        ("https://ghcr.io", "http://ghcr.io/token"),
        ("http://localhost", "ftp://localhost/token"),
        ("https://ghcr.io", ""),
        ("https://ghcr.io", "https://evil.example/token"),
        ("https://ghcr.io", "https://ghcr.io.evil.example/token"),
        ("https://10.0.0.1", "https://10.1.0.1/token"),
        ("https://registry", "https://token.registry/token"),
        ("http://registry.lan", "http://registry.lan/token"),
    ],
)
def test_a_password_goes_in_clear_or_to_another_domain_never(
    api: str, realm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(url: str, headers: object) -> tuple[int, bytes]:
        pytest.fail(f"{url} was asked")

    credentials = Credentials(username="bob", password="s3cret")
    transport = Transport(api, "h")
    transport.credentials = credentials
    monkeypatch.setattr(transport, "_fetch_token", fetch)
    with pytest.raises(AccessError, match=r"https|TLS"):
        transport.log_in("repository:a:pull", f'Bearer realm="{realm}",service="x"', None)


def test_a_token_service_of_the_same_domain_gets_the_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def fetch(url: str, headers: Mapping[str, str]) -> tuple[int, bytes]:
        asked.append((url.partition("?")[0], headers["Authorization"]))
        return 200, b'{"token": "t"}'

    credentials = Credentials(username="bob", password="s3cret")
    transport = Transport("https://registry-1.docker.io", "docker.io")
    transport.credentials = credentials
    monkeypatch.setattr(transport, "_fetch_token", fetch)
    realm = "https://auth.docker.io/token"
    assert transport.log_in("s", f'Bearer realm="{realm}",service="x"', None)
    assert asked == [(realm, credentials.header())]
