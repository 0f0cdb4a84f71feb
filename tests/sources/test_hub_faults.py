"""What a hub refuses, breaks or sends wrong, and what the source says then."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.core.errors import AccessError, CorruptError, NotFoundError, TransientError
from pipeline.sources.hub import HubSource
from tests.sources.hub_fetch import SOURCE, run_fetch
from tests.sources.hub_server import COMMIT, REPO, HubServer
from tests.sources.tiny_model import SHARDS


def test_too_many_bytes_are_refused(hub: HubServer) -> None:
    hub.sent[SHARDS[1]] = hub.files[SHARDS[1]] + b"more"

    with pytest.raises(CorruptError, match=SHARDS[1]):
        SOURCE.fetch()


def test_intact_download_of_a_broken_safetensors_file_is_refused(hub: HubServer) -> None:
    hub.files[SHARDS[1]] = hub.files[SHARDS[1]][:-3]

    with pytest.raises(CorruptError, match=f"{SHARDS[1]}: truncated"):
        SOURCE.fetch()


def test_gated_recipe_without_token_asks_for_one_before_any_request(hub: HubServer) -> None:
    gated = HubSource(repo_id=REPO, revision=COMMIT, licence="MIT", gated=True)

    with pytest.raises(AccessError, match="HF_TOKEN is not set") as caught:
        gated.fetch()

    assert caught.value.exit_code == 1
    assert not hub.requests


@pytest.mark.parametrize(
    ("token", "step"),
    [(None, "then set HF_TOKEN"), ("hf_other", "the token in HF_TOKEN has no access")],
)
def test_gated_repository_is_explained(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, token: str | None, step: str
) -> None:
    hub.gated = True
    if token:
        monkeypatch.setenv("HF_TOKEN", token)

    with pytest.raises(AccessError, match=step) as caught:
        SOURCE.fetch()

    assert f"{hub.endpoint}/{REPO}" in str(caught.value)


def test_unknown_repository_is_not_found(hub: HubServer) -> None:
    other = HubSource(repo_id="acme/typo", revision=COMMIT, licence="MIT")

    with pytest.raises(NotFoundError, match="no model acme/typo") as caught:
        other.fetch()

    assert caught.value.exit_code == 7


@pytest.mark.parametrize("status", [429, 500])
def test_lasting_fault_of_the_hub_is_transient(hub: HubServer, status: int) -> None:
    hub.always = status

    with pytest.raises(TransientError, match=f"HTTP {status}") as caught:
        SOURCE.fetch()

    assert caught.value.exit_code == 9


def test_no_network_is_transient(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")

    with pytest.raises(TransientError, match=r"127\.0\.0\.1:9"):
        SOURCE.fetch()


def test_offline_mode_of_the_library_is_explained(hub: HubServer) -> None:
    done = run_fetch({"HF_HUB_OFFLINE": "1"})  # read when the library is imported

    assert "AccessError: HF_HUB_OFFLINE is set" in done.stderr


def test_download_larger_than_the_disk_is_not_started(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage("/")._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)

    with pytest.raises(TransientError, match=r"disk full.*ENGINESMITH_CACHE"):
        SOURCE.fetch()

    assert not hub.cdn_requests(SHARDS[0])
