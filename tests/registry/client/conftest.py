"""Signed packages in stores of every kind, and a machine to pull them to."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.values import Engine, Reference, VerdictName
from pipeline.registry.client.download import Transfer
from pipeline.registry.client.machine import Flags
from pipeline.registry.client.pull import PullRequest, pull_from
from pipeline.registry.client.receipt import Pulled
from pipeline.registry.client.retry import Retry
from pipeline.registry.lifecycle.channels import move_channel
from pipeline.registry.lifecycle.records import Author
from pipeline.registry.lifecycle.yank import yank_package
from pipeline.registry.signing.keys import SigningKey, generate_key
from pipeline.registry.signing.signer import build_statements, sign_report
from pipeline.registry.signing.trust import TrustPolicy
from pipeline.registry.stores.store import Place, Store, WritableStore
from tests.registry.backends import Backends, running_backends
from tests.registry.signing.conftest import RUN, trusted

CARD = "NVIDIA-GeForce-RTX-4090"
OTHER_CARD = "NVIDIA-L4"
VARIANT = "sm89-trtrtx-fp8-b8"
PIECE_BYTES = 4096
QUICK = Retry(tries=3, tries_of_piece=8, first_s=0.001, longest_s=0.01)


def noise(size_bytes: int, seed: int = 0) -> bytes:
    """Bytes that do not repeat."""
    blocks = -(-size_bytes // 32)
    parts = (hashlib.sha256(f"{seed} {block}".encode()).digest() for block in range(blocks))
    return b"".join(parts)[:size_bytes]


@dataclass(frozen=True, kw_only=True)
class Shop:
    """A store with signed packages, and a machine that pulls from it.

    Attributes:
        bench: Makes engines.
        store: Where they are published.
        home: Of the machine: its policy, and folders to pull to.
        key: Signs builds and verdicts.
    """

    bench: Any
    store: WritableStore
    home: Path
    key: SigningKey = field(default_factory=generate_key)

    @property
    def to(self) -> Path:
        return self.home / "models" / "tiny"

    def engine(self, variant: str = VARIANT, files: Mapping[str, bytes] | None = None) -> Engine:
        folder = self.home / f"engine-{variant}-{os.urandom(4).hex()}"
        contents = files or {
            "model.plan": noise(5 * PIECE_BYTES + 17),
            "config.json": b"{}",
            "empty": b"",
            "tokenizer/tokenizer.json": noise(PIECE_BYTES, seed=1),
        }
        for path, data in contents.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
        made: Engine = self.bench.engine(variant=variant)
        return replace(made, dir=folder)

    def publish(
        self,
        engine: Engine | None = None,
        *,
        version: str = "1.0",
        name: str = "tiny",
        signed: bool = True,
        verdict: VerdictName | None = "accepted",
        card: str = CARD,
        channel: str = "stable",
        **label: Any,
    ) -> Reference:
        """Publish a package, with a verdict and a channel for a card unless `verdict` is None."""
        engine = engine or self.engine()
        folder = self.home / f"sealed-{os.urandom(4).hex()}"
        folder.mkdir(parents=True)
        made = dataclasses.replace(self.bench.label(version, name=name), **label)
        package = self.bench.seal(folder, engine, made)
        statements = build_statements(package, self.key, RUN) if signed else {}
        self.store.put_package(package, statements, lambda count: None)
        shutil.rmtree(folder)
        reference = Reference(
            name=name, variant=engine.variant, version=made.version, digest=package.digest
        )
        if verdict is not None:
            self.judge(reference, verdict, card)
            self.point(reference, card, channel)
        return reference

    def judge(
        self,
        reference: Reference,
        verdict: VerdictName = "accepted",
        card: str = CARD,
        *,
        name: str = "",
        key: SigningKey | None = None,
    ) -> None:
        """Add a signed verdict."""
        report = self.bench.report(reference, verdict, card)
        files = {"report.json": report, **sign_report(report, key or self.key)}
        self.store.put_statement(Place.of(reference), name or f"test-{card}", files)

    def point(
        self,
        reference: Reference,
        card: str = CARD,
        channel: str = "stable",
        *,
        key: SigningKey | None = None,
    ) -> None:
        """Let a channel point to a package, by a signed move."""
        mover = key or self.key
        move_channel(
            self.store,
            reference,
            channel=channel,
            card=card,
            key=mover,
            actor="ada",
            policy=TrustPolicy(keys=(trusted(mover, "channels"),)),
        )

    def yank(
        self, reference: Reference, *, key: SigningKey | None = None, undo: bool = False
    ) -> None:
        """Yank a package, or undo that."""
        author = Author(key=key or self.key, actor="ada", reason="crashes")
        policy = TrustPolicy(keys=(trusted(author.key, "channels"),))
        yank_package(self.store, reference, author, policy, undo=undo)

    def policy(self, **more: Any) -> Path:
        """The machine's trust policy, as a file."""
        key = trusted(self.key, "builds", "verdicts", "channels", name="release")
        keys = [{**dataclasses.asdict(key), "may_sign": list(key.may_sign)}]
        path = self.home / "policy.json"
        private = self.home / f"policy-{os.getpid()}"  # many processes may pull at once
        private.write_text(json.dumps({"schema": 1, "keys": keys, **more}))
        return private.replace(path)

    def request(self, reference: str = "tiny", **more: Any) -> PullRequest:
        """A pull for a 4090 that is not there, in small pieces and without patience."""
        flags = Flags(**{"gpu": "rtx4090", **more.pop("flags", {})})
        defaults: dict[str, Any] = {
            "to": self.to,
            "environ": {},
            "transfer": Transfer(piece_bytes=PIECE_BYTES, retry=QUICK),
            "jobs": 3,
        }
        if "policy" not in more:
            more["policy"] = self.policy()
        return PullRequest(reference=reference, flags=flags, **{**defaults, **more})

    def pull(self, reference: str = "tiny", store: Store | None = None, **more: Any) -> Pulled:
        return pull_from(store or self.store, self.request(reference, **more))

    def left(self) -> list[str]:
        """What is in the folder that holds the goal."""
        parent = self.to.parent
        return sorted(path.name for path in parent.iterdir()) if parent.is_dir() else []


@pytest.fixture(scope="session")
def running() -> Iterator[Backends]:
    with running_backends() as started:
        yield started


@pytest.fixture
def shop_of(
    running: Backends, bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Shop]:
    """A shop on a backend."""

    def make(backend: str = "folder") -> Shop:
        home = tmp_path / "home"
        home.mkdir(exist_ok=True)
        monkeypatch.setenv("ENGINESMITH_CACHE", str(tmp_path / "cache"))
        for name, value in running.environ(backend).items():
            monkeypatch.setenv(name, value)
        return Shop(bench=bench, store=running.store(backend, tmp_path / "registry"), home=home)

    return make


@pytest.fixture
def shop(shop_of: Callable[[str], Shop]) -> Shop:
    """A shop in a folder."""
    return shop_of("folder")


def engine_files(folder: Path) -> dict[str, bytes]:
    """Everything below `engine/`."""
    root = folder / "engine"
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }
