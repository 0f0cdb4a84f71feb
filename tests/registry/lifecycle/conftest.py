"""Signed packages in a store, and those who may move channels there."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pipeline.registry.lifecycle.channels import move_channel
from pipeline.registry.lifecycle.promote import Moved, promote, rollback
from pipeline.registry.lifecycle.records import Author, Move
from pipeline.registry.signing.keys import SigningKey, generate_key, write_key_pair
from pipeline.registry.signing.signer import sign_package, sign_report
from pipeline.registry.signing.trust import TrustPolicy
from pipeline.registry.stores.store import Place, WritableStore
from tests.registry.signing.conftest import RUN, trusted

from pipeline.core.values import Reference, VerdictName
from pipeline.registry.stores.folder import FolderStore

CARD = "NVIDIA-GeForce-RTX-4090"
OTHER_CARD = "NVIDIA-L4"
VARIANT = "sm89-trtrtx-fp8-b8"


@dataclass(frozen=True, kw_only=True)
class World:
    """A store, and one key for everything."""

    bench: Any
    store: WritableStore
    home: Path
    key: SigningKey = field(default_factory=generate_key)

    @property
    def policy(self) -> TrustPolicy:
        key = trusted(self.key, "builds", "verdicts", "channels", name="release")
        return TrustPolicy(keys=(key,))

    def author(self, actor: str = "ada", reason: str = "") -> Author:
        return Author(key=self.key, actor=actor, reason=reason)

    def publish(
        self,
        version: str = "1.0",
        verdict: VerdictName | None = "accepted",
        name: str = "tiny",
        *,
        signed: bool = True,
    ) -> Reference:
        """A signed package with a signed verdict."""
        folder = self.home / f"sealed-{name}-{version}"
        folder.mkdir(parents=True)
        label = self.bench.label(version, name=name)
        package = self.bench.seal(folder, self.bench.engine(version.encode()), label)
        statements = {"build-1": sign_package(package, self.key, RUN)} if signed else {}
        self.store.put_package(package, statements, lambda _: None)
        reference = Reference(
            name=name, variant=VARIANT, version=label.version, digest=package.digest
        )
        if verdict is not None:
            self.judge(reference, verdict)
        return reference

    def judge(
        self,
        reference: Reference,
        verdict: VerdictName = "accepted",
        card: str = CARD,
        name: str = "test-1",
        key: SigningKey | None = None,
    ) -> None:
        report = self.bench.report(reference, verdict, card)
        files = {"report.json": report, **sign_report(report, key or self.key)}
        self.store.put_statement(Place.of(reference), name, files)

    def move(self, reference: Reference, channel: str = "stable", **more: Any) -> Move:
        """The move alone, without looking at the package."""
        given: dict[str, Any] = {
            "channel": channel,
            "card": CARD,
            "key": self.key,
            "actor": "ada",
            "policy": self.policy,
        }
        return move_channel(self.store, reference, **{**given, **more})

    def promote(self, text: str, channel: str = "stable", **more: Any) -> Moved:
        given: dict[str, Any] = {
            "channel": channel,
            "card": None,
            "author": self.author(),
            "policy": self.policy,
        }
        return promote(self.store, text, **{**given, **more})

    def rollback(self, text: str = "tiny", channel: str = "stable", **more: Any) -> Moved:
        given: dict[str, Any] = {
            "channel": channel,
            "card": None,
            "author": self.author(),
            "policy": self.policy,
        }
        return rollback(self.store, text, **{**given, **more})

    def log_dir(self, name: str = "tiny") -> Path:
        """Of a folder store."""
        return Path(self.store.url) / name / VARIANT / "channels" / "log"

    def pointer(self, channel: str = "stable", card: str = CARD) -> bytes:
        return self.store.channels("tiny", VARIANT)[f"{channel}.{card}.json"]

    def age(self, reference: Reference, days: float) -> None:
        """As if everything was said so long ago; of a folder store."""
        place = Place.of(reference)
        root = Path(self.store.url) / place.name / place.variant
        then = time.time() - days * 86400
        for statement in (root / f"{place.version}.statements").iterdir():
            os.utime(statement, (then, then))

    def environ(self) -> Mapping[str, str]:
        """That of a process which signs with the key."""
        path = self.home / "release.key"
        if not path.exists():
            write_key_pair(self.key, path)
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.home),
            "ENGINESMITH_CONFIG": str(self.home / "config"),
            "ENGINESMITH_SIGNING_KEY": str(path),
            "ENGINESMITH_ACTOR": "ada",
        }


@pytest.fixture
def world(bench: Any, tmp_path: Path) -> World:
    home = tmp_path / "home"
    home.mkdir()
    return World(bench=bench, store=FolderStore(path=tmp_path / "artifacts"), home=home)
