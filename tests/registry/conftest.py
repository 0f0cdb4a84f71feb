"""A small engine, and registries to publish it to."""

from __future__ import annotations

import json
import logging
import os
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pipeline.core.errors import PipelineError
from pipeline.core.values import (
    Engine,
    Finding,
    Licence,
    Limits,
    Package,
    Reference,
    Report,
    Verdict,
    VerdictName,
    Weights,
)
from pipeline.registry.folder import FolderRegistry
from pipeline.registry.lifecycle.promote import Moved, enter_channel
from pipeline.registry.lifecycle.records import Author
from pipeline.registry.manifest import Label
from pipeline.registry.package import seal
from pipeline.registry.signing.attestations import BuildRun
from pipeline.registry.signing.keys import SigningKey, generate_key
from pipeline.registry.signing.signer import build_statements, sign_report
from pipeline.registry.signing.trust import Role, TrustedKey, TrustPolicy

CARD = "NVIDIA-GeForce-RTX-4090"
RUN = BuildRun(
    builder_id="https://example.com/builder",
    builder_version="0",
    invocation_id="1",
    started=datetime(2026, 1, 1, tzinfo=UTC),
    finished=datetime(2026, 1, 1, tzinfo=UTC),
)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Makes engines and publishes them, as a build does."""

    dir: Path
    registry: FolderRegistry
    card: str = CARD
    key: SigningKey = field(default_factory=generate_key, repr=False)

    @property
    def policy(self) -> TrustPolicy:
        """Believes the bench's key in everything."""
        pem = self.key.public.pem.decode()
        roles: tuple[Role, ...] = ("builds", "verdicts", "channels")
        return TrustPolicy(keys=(TrustedKey(name="bench", public_key=pem, may_sign=roles),))

    def engine(self, plan: bytes = b"plan" * 100, variant: str = "sm89-trtrtx-fp8-b8") -> Engine:
        folder = self.dir / f"engine-{variant}-{hash(plan)}"
        (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
        (folder / "model.plan").write_bytes(plan)
        (folder / "tokenizer" / "tokenizer.json").write_text("{}")
        return Engine(
            dir=folder,
            digest="e" * 64,
            format="trtrtx",
            variant=variant,
            runtime=("tensorrt-rtx", "1.7.1.116"),
            sms=(89,),
            limits=Limits(
                max_batch_size=8, max_seq_len=1024, max_num_tokens=1024, kv_cache_dtype="bfloat16"
            ),
            min_vram_bytes=1 << 30,
            tools={"tensorrt-rtx": "1.7.1.116"},
        )

    def weights(self) -> Weights:
        return Weights(
            dir=self.dir,
            origin="hub:someone/tiny",
            commit="0" * 40,
            files=(),
            licence=Licence(spdx="Apache-2.0", files=("LICENSE",)),
        )

    def label(self, version: str = "1.0", build_key: str = "b" * 64, name: str = "tiny") -> Label:
        return Label(
            name=name,
            version=f"{version}-{build_key[:12]}",
            build_key=build_key,
            config={"quantizer": {"calib_size": 64}},
        )

    def publish(self, engine: Engine | None = None, label: Label | None = None) -> Reference:
        with self.registry.staging() as staging:
            package = self.seal(staging, engine, label)
            return self.registry.publish(package)

    def seal(
        self, folder: Path, engine: Engine | None = None, label: Label | None = None
    ) -> Package:
        return seal(folder, engine or self.engine(), self.weights(), label or self.label())

    def report(
        self, reference: Reference, verdict: VerdictName = "checked", card: str = CARD
    ) -> bytes:
        report = Report(
            digest=reference.digest,
            card=card,
            conditions={},
            speed=[],
            quality={"perplexity": 12.5},
            not_run=[],
            checks={},
        )
        judged = Verdict(name=verdict, findings=(Finding(kind="note", message="ran on a CPU"),))
        return json.dumps(report.to_json(judged)).encode()

    def accept(
        self, reference: Reference, verdict: VerdictName = "checked", name: str = "test-1"
    ) -> Path:
        files = {"report.json": self.report(reference, verdict)}
        return self.registry.add_statement(reference, name, files)

    def sign(self, reference: Reference) -> None:
        """Sign a published package, unless it is signed."""
        if any(self.registry.statements_dir(reference).glob("build-*")):
            return
        package = self.registry.resolve(str(reference))
        for name, files in build_statements(package, self.key, RUN).items():
            self.registry.add_statement(reference, name, files)

    def approve(
        self,
        reference: Reference,
        verdict: VerdictName = "checked",
        name: str = "test-1",
        card: str = CARD,
    ) -> Path:
        """Sign a published package and a verdict."""
        self.sign(reference)
        report = self.report(reference, verdict, card)
        files = {"report.json": report, **sign_report(report, self.key)}
        return self.registry.add_statement(reference, name, files)

    def enter(self, reference: Reference, channel: str = "candidate", card: str = CARD) -> Moved:
        """Move a channel to a package, as a build does."""
        return enter_channel(
            self.registry.store,
            reference,
            channel=channel,
            card=card,
            author=Author(key=self.key, actor="ada"),
            policy=self.policy,
        )

    def resolve(self, text: str, card: str | None = None) -> Package:
        """As somebody who believes the bench's key."""
        return self.registry.resolve(text, card, self.policy)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    (tmp_path / "work").mkdir()
    return Bench(dir=tmp_path / "work", registry=FolderRegistry(path=tmp_path / "artifacts"))


InChildren = Callable[[Sequence[Callable[[], object]]], list[int]]


@pytest.fixture
def in_children() -> InChildren:
    """Run functions at the same moment, each in a process of its own.

    Returns what each process ended with: 0, the exit code of its error, or minus its signal.
    """

    def run(jobs: Sequence[Callable[[], object]]) -> list[int]:
        start_read, start_write = os.pipe()
        pids = []
        for job in jobs:
            pid = os.fork()
            if pid == 0:
                code = 99
                try:
                    logging.disable()
                    os.close(start_write)
                    os.read(start_read, 1)  # returns when the parent closes its end
                    job()
                    code = 0
                except PipelineError as error:
                    code = error.exit_code
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(code)
            pids.append(pid)
        os.close(start_read)
        os.close(start_write)
        return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]

    return run
