"""The Hub source against a real server on loopback, through the real library."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.core.errors import (
    AccessError,
    CorruptError,
    PipelineError,
    TransientError,
)
from pipeline.sources.hub import HubSource
from tests.sources.hub_server import (
    COMMIT,
    FETCH,
    REPO,
    SOURCE,
    TOKEN,
    HubServer,
    partial_files,
    run_fetch,
)
from tests.sources.tiny_model import SHARDS, safetensors

WANTED = {
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja", "LICENSE", "NOTICE.txt", "USE_POLICY.md",
    "model.safetensors.index.json", *SHARDS,
}  # fmt: skip


def test_fetch_brings_what_a_build_needs_and_nothing_else(hub: HubServer) -> None:
    weights = SOURCE.fetch()

    assert {path.name for path in weights.dir.iterdir()} == WANTED
    assert all((weights.dir / name).read_bytes() == hub.files[name] for name in WANTED)
    assert {file.path: file.sha256 for file in weights.files} == {
        name: hashlib.sha256(hub.files[name]).hexdigest() for name in WANTED
    }
    assert (weights.origin, weights.commit) == (f"hub:{REPO}", COMMIT)
    assert weights.licence.files == ("LICENSE", "NOTICE.txt", "USE_POLICY.md")
    assert COMMIT in str(weights.dir)
    assert not list(weights.dir.parent.parent.glob("*.partial"))


def test_a_single_safetensors_file_is_enough(hub: HubServer) -> None:
    hub.files["model.safetensors"] = safetensors({"a": 9})
    for name in SHARDS:
        del hub.files[name]

    names = {file.path for file in SOURCE.fetch().files}

    assert "model.safetensors" in names
    assert "model.safetensors.index.json" not in names


def test_token_goes_to_the_hub_and_never_to_the_cdn(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.gated = True
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    SOURCE.fetch()

    for request in hub.requests:
        assert ("Authorization" in request.headers) != request.path.startswith("/cdn/"), request


def test_token_file_of_the_library_is_not_read(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    (tmp_path / "token").write_text(TOKEN)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))

    SOURCE.fetch()

    assert not any("Authorization" in request.headers for request in hub.requests)


def test_second_fetch_needs_no_network_no_token_and_no_library(hub: HubServer, cache: Path) -> None:
    SOURCE.fetch()
    hub.requests.clear()
    started = time.perf_counter()
    SOURCE.fetch()
    assert time.perf_counter() - started < 0.5
    assert not hub.requests

    done = run_fetch({"HF_ENDPOINT": "http://127.0.0.1:9"})

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"


def test_two_runs_at_once_download_once(hub: HubServer) -> None:
    children = [subprocess.Popen([sys.executable, "-c", FETCH]) for _ in range(2)]

    assert [child.wait(timeout=60) for child in children] == [0, 0]
    assert len(hub.cdn_requests(SHARDS[0])) == 1


@pytest.mark.parametrize("name", [SHARDS[0], "tokenizer.json"])
def test_wrong_bytes_of_the_right_size_are_refused_and_removed(
    hub: HubServer, cache: Path, name: str
) -> None:
    right = hub.files[name]
    hub.sent[name] = right[:-1] + bytes([right[-1] ^ 1])

    with pytest.raises(CorruptError, match=name) as caught:
        SOURCE.fetch()

    assert caught.value.exit_code == 4
    assert not list(partial_files(cache).glob(f"{name}*"))
    hub.sent.clear()
    assert (SOURCE.fetch().dir / name).read_bytes() == right


def test_leftovers_of_another_version_do_not_get_into_the_folder(
    hub: HubServer, cache: Path
) -> None:
    partial_files(cache).mkdir(parents=True)
    (partial_files(cache) / "pytorch_model.bin").write_bytes(b"pickle")

    assert {path.name for path in SOURCE.fetch().dir.iterdir()} == WANTED


def test_endpoint_without_digests_or_with_another_commit_is_refused(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = hub.listing()
    monkeypatch.setattr(hub, "listing", lambda: listing)
    del listing["siblings"][0]["blobId"]
    with pytest.raises(PipelineError, match="without size and digest"):
        SOURCE.fetch()
    listing["sha"] = "e" * 40
    with pytest.raises(CorruptError, match=f"commit {'e' * 40}, asked for {COMMIT}"):
        SOURCE.fetch()


def test_gated_recipe_without_token_asks_for_one_before_any_request(hub: HubServer) -> None:
    gated = HubSource(repo_id=REPO, revision=COMMIT, licence="MIT", gated=True)

    with pytest.raises(AccessError, match="HF_TOKEN is not set") as caught:
        gated.fetch()

    assert caught.value.exit_code == 1
    assert not hub.requests


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
