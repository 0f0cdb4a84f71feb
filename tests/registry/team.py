"""A registry, the keys of those who build, test and release, and what they sign."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.published import Package, Reference, VerdictName
from pipeline.registry.promotion import Moved, Releaser
from pipeline.registry.reference import reference_of
from pipeline.registry.resolve import examine
from pipeline.registry.store import RawStatement
from pipeline.registry.stores import open_store
from pipeline.registry.stores.publication import WritableStore
from pipeline.registry.trust.policy import ROLES, Role, TrustedKey, TrustPolicy
from pipeline.registry.trust.private_key import SigningKey
from pipeline.registry.trust.signing import Signatory, generate_key, sign_test
from pipeline.registry.trust.verification import Resolved, Terms
from tests.registry.packages import place_of, sealed_package

CARD = "NVIDIA-GeForce-RTX-4090"
OTHER_CARD = "NVIDIA-L4"
RUNTIME = ("tensorrt-rtx", "1.7.1.116")
BUILDER = "https://ci.example/build"
STARTED = datetime(2026, 11, 25, 9, 0, tzinfo=UTC)


def trusted(key: SigningKey, *roles: Role, name: str = "ci") -> TrustedKey:
    return TrustedKey(name=name, public_key=key.public.pem.decode(), may_sign=roles)


@dataclass(frozen=True, kw_only=True)
class Team:
    """A store, and the keys of those who build, test and release; one key may have several rights.

    Attributes:
        dir: For packages that are sealed, and for the policy's file.
        store: Any registry.
        builder: May sign builds.
        tester: May sign verdicts.
        releaser: May sign channels.
    """

    dir: Path
    store: WritableStore
    builder: SigningKey = field(default_factory=generate_key)
    tester: SigningKey = field(default_factory=generate_key)
    releaser: SigningKey = field(default_factory=generate_key)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def policy(self) -> TrustPolicy:
        rights: dict[str, tuple[SigningKey, str, list[Role]]] = {}
        for key, name, role in zip(
            (self.builder, self.tester, self.releaser),
            ("builder", "tester", "releaser"),
            ROLES,
            strict=True,
        ):
            rights.setdefault(key.public.keyid, (key, name, []))[2].append(role)
        keys = (trusted(key, *roles, name=name) for key, name, roles in rights.values())
        return TrustPolicy(keys=tuple(keys))

    def policy_file(self, **more: Any) -> Path:
        """The policy for commands; many processes may ask at once."""
        keys = [
            {"name": key.name, "public_key": key.public_key, "may_sign": list(key.may_sign)}
            for key in self.policy.keys
        ]
        private = self.dir / f"policy-{os.getpid()}"
        private.write_text(json.dumps({"schema": 1, "keys": keys, **more}))
        return private.replace(self.dir / "policy.json")

    def releasing(self, **more: Any) -> Releaser:
        """What moves channels and yanks; `more` in place of the team's own."""
        who = {"key": self.releaser, "actor": "ada", "reason": "it is slow"}
        return Releaser(**{"store": self.store, "policy": self.policy, **who, **more})

    def seal(self, plan: bytes = b"plan", **more: Any) -> Package:
        """A package that is published nowhere."""
        folder = self.dir / f"package-{next(self._numbers)}"
        return sealed_package(folder, {"model.plan": plan}, **more)

    def statements(self, package: Package) -> list[RawStatement]:
        """What the builder signs about a package: signature and provenance."""
        signatory = Signatory(
            key=self.builder, trust=self.policy, builder_id=BUILDER, invocation_id="run-1"
        )
        return signatory.sign_build(package, STARTED)

    def publish(self, plan: bytes = b"plan", verdict: str = "", **more: Any) -> Package:
        """A signed package; with a verdict on `CARD` if one is given."""
        package = self.seal(plan, **more)
        self.store.put_package(package, self.statements(package), lambda _: None)
        if verdict:
            self.test(package, verdict)
        return package

    def test(
        self,
        of: Package | Reference,
        verdict: str,
        card: str = CARD,
        runtime: tuple[str, str] = RUNTIME,
        key: SigningKey | None = None,
    ) -> RawStatement:
        """Publish a test result."""
        name: VerdictName = verdict  # type: ignore[assignment]  # a bad one is a test of its own
        raw = sign_test(
            of.digest,
            key or self.tester,
            card=card,
            runtime=runtime,
            verdict=name,
            files={"report.json": b"{}", "report.html": b"<p>"},
        )
        self.store.put_statement(place_of(of), raw)
        return raw

    def enter(self, package: Package, channel: str = "stable", card: str | None = None) -> Moved:
        """Promote a package into a channel."""
        return self.releasing().promote(str(reference_of(package)), channel, card)

    def yank(self, package: Package, *, undo: bool = False, **more: Any) -> tuple[Resolved, bool]:
        """Yank a package, or undo that."""
        return self.releasing(**more).yank(str(reference_of(package)), undo=undo)

    def examine(self, package: Package) -> Resolved:
        """As a reader sees it."""
        return examine(self.store, place_of(package), Terms(policy=self.policy))


@pytest.fixture
def team(tmp_path: Path) -> Team:
    (tmp_path / "work").mkdir()
    store = open_store(str(tmp_path / "artifacts"))
    return Team(dir=tmp_path / "work", store=store)
