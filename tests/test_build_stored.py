"""`enginesmith build` into a real S3 server, and what other commands see there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.registry.trust.signing import generate_key, write_key_pair
from tests.registry.backends import Backends, backends
from tests.tiny_recipe import CHECKPOINT, make_workplace

pytestmark = pytest.mark.services
QUICK = (*CHECKPOINT, "acceptance.chat=null")


@pytest.fixture(scope="module")
def servers() -> Iterator[Backends]:
    with Backends() as made:
        yield made


@pytest.mark.parametrize("backend", backends[1:])
def test_build_publishes_to_a_server_and_the_next_machine_takes_it(
    backend: str, servers: Backends, tmp_path: Path
) -> None:
    place = make_workplace(tmp_path / "place")
    url = servers.store(backend, tmp_path).url
    where = (f"registry={backend}", f"registry.url={url}")
    environ = servers.environ(backend)

    refused = place.build(*QUICK, *where, **environ)
    assert refused.returncode == 2
    assert "ENGINESMITH_SIGNING_KEY" in refused.stderr
    assert not place.cache.exists()

    write_key_pair(generate_key(), tmp_path / "ci.key")
    environ = {**environ, "ENGINESMITH_SIGNING_KEY": str(tmp_path / "ci.key")}
    done = place.build(*QUICK, *where, **environ)
    assert done.returncode == 0, done.stderr
    assert f"--registry {url}" in done.stdout
    reference = place.verdict()["reference"]

    other = make_workplace(tmp_path / "other", model=place.root / "model")
    again = other.build(*QUICK, *where, **environ)
    assert again.returncode == 0, again.stderr
    assert other.verdict()["taken"] is True
    assert other.verdict()["digest"] == place.verdict()["digest"]

    told = other.run("list", "--registry", url, "--json", **environ)
    (listed,) = json.loads(told.stdout)["packages"]
    assert listed["reference"] == reference
    shown = other.run("show", reference, "--registry", url, **environ)
    assert "this machine's own key" in shown.stdout, shown.stderr
    verified = other.run("verify", reference, "--registry", url, **environ)
    assert verified.returncode == 0, verified.stderr
    stranger = {**environ, "ENGINESMITH_SIGNING_KEY": ""}
    assert other.run("verify", reference, "--registry", url, **stranger).returncode == 5
