"""Signed packages in a store, and a machine that pulls them."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.published import Reference, VerdictName
from pipeline.registry.client import download
from pipeline.registry.client.machine import Flags
from pipeline.registry.client.pull import Pulled, PullRequest, run
from pipeline.registry.client.verify import verify
from pipeline.registry.reference import reference_of
from pipeline.registry.store import Store
from pipeline.registry.stores.folder import FolderRegistry
from pipeline.registry.stores.publication import WritableStore
from pipeline.registry.trust.private_key import SigningKey
from pipeline.registry.trust.signing import generate_key, sign_package
from tests.registry.packages import sealed_package
from tests.registry.team import CARD, RUNTIME, Team

CHUNK_BYTES = 4096
TRIES = 3
FILES: Mapping[str, bytes] = {
    "config.json": b"{}",
    "empty": b"",
}


def noise(size_bytes: int, seed: int = 0) -> bytes:
    """Bytes that do not repeat."""
    blocks = -(-size_bytes // 32)
    parts = (hashlib.sha256(f"{seed} {block}".encode()).digest() for block in range(blocks))
    return b"".join(parts)[:size_bytes]


@dataclass(frozen=True, kw_only=True)
class Shop:
    """A store with signed packages, and a machine that pulls from it.

    Attributes:
        store: Where they are published.
        home: Of the machine: its policy, and folders to pull to.
        key: Signs builds, verdicts and moves.
    """

    store: WritableStore
    home: Path
    key: SigningKey = field(default_factory=generate_key)

    @property
    def team(self) -> Team:
        """Those who publish: one key with every right."""
        key = self.key
        return Team(dir=self.home, store=self.store, builder=key, tester=key, releaser=key)

    @property
    def to(self) -> Path:
        return self.home / "models" / "tiny"

    def publish(
        self,
        files: Mapping[str, bytes] | None = None,
        *,
        signed: bool = True,
        verdict: VerdictName | None = "accepted",
        card: str = CARD,
        channel: str = "stable",
        runtime: tuple[str, str] = RUNTIME,
        **label: Any,
    ) -> Reference:
        """Publish a package, with a verdict and a channel for a card unless `verdict` is None."""
        contents = dict(files or {})
        if files is None:
            contents = {
                "model.plan": noise(5 * CHUNK_BYTES + 17),
                "tokenizer/tokenizer.json": noise(CHUNK_BYTES, seed=1),
                **FILES,
            }
        folder = self.home / f"sealed-{os.urandom(4).hex()}"
        package = sealed_package(folder, contents, runtime=runtime, **label)
        statements = [sign_package(package, self.key)] if signed else []
        self.store.put_package(package, statements, lambda count: None)
        shutil.rmtree(folder)
        reference = reference_of(package)
        if verdict is not None:
            self.team.test(reference, verdict, card, runtime)
            self.team.releasing().move(reference, channel, card)
        return reference

    def yank(self, reference: Reference, *, undo: bool = False) -> None:
        """Yank a package, or undo that."""
        self.team.releasing().yank(str(reference), undo=undo)

    def policy(self, **more: Any) -> Path:
        """The machine's trust policy, as a file."""
        return self.team.policy_file(**more)

    def request(self, reference: str = "tiny", **more: Any) -> PullRequest:
        """A pull for a 4090 that is not there."""
        flags = Flags(**{"gpu": "rtx4090", **more.pop("flags", {})})
        defaults: dict[str, Any] = {"to": self.to, "environ": {}, "jobs": 3}
        if "policy" not in more:
            more["policy"] = self.policy()
        return PullRequest(reference=reference, flags=flags, **{**defaults, **more})

    def pull(self, reference: str = "tiny", store: Store | None = None, **more: Any) -> Pulled:
        return run(self.request(reference, **more), store or self.store)

    def verify(self, target: Path | str, **more: Any) -> Pulled:
        """For a 4090 unless `flags` say otherwise."""
        flags = Flags(**{"gpu": "rtx4090", **more.pop("flags", {})})
        wanted = PullRequest(
            reference=str(target), flags=flags, policy=self.policy(), environ={}, **more
        )
        return verify(wanted)

    def left(self) -> list[str]:
        """What is in the folder that holds the goal."""
        parent = self.to.parent
        return sorted(path.name for path in parent.iterdir()) if parent.is_dir() else []


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pulls come in small chunks and without patience."""
    monkeypatch.setattr(download, "CHUNK_BYTES", CHUNK_BYTES)
    monkeypatch.setattr(download, "TRIES", TRIES)
    monkeypatch.setattr(download, "FIRST_WAIT_S", 0.001)


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    """A shop in a folder."""
    hurry(monkeypatch)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("ENGINESMITH_CACHE", str(tmp_path / "cache"))
    return Shop(store=FolderRegistry(path=tmp_path / "registry").store(), home=home)


def engine_files(folder: Path) -> dict[str, bytes]:
    """Everything below `engine/`, less the model signature."""
    root = folder / "engine"
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != "model.sig"
    }
