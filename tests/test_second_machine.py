"""A package is built on one machine and accepted on another, after it was published.

The two share a registry and a trust policy, and no key. Only the card of the second is pretended
(`tests.stand_in_card`); the commands run as users run them, each in a process of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.registry.manifest import files_of, manifest_at
from pipeline.registry.store import Place
from pipeline.registry.stores.publication import WritableStore
from pipeline.registry.trust.signing import generate_key, write_key_pair
from tests.registry.backends import Backends, backends
from tests.registry.packages import read_files
from tests.stand_in_card import put_card, put_runner
from tests.tiny import tiny_model
from tests.tiny_recipe import CHECKPOINT, ROOT, Workplace, make_workplace

pytestmark = pytest.mark.slow

CARD, OTHER_CARD = "NVIDIA-L4", "NVIDIA-GeForce-RTX-4090"
PLAIN = ("acceptance.chat=null", "acceptance.windows=3")
ON_CARD = tuple(word for word in CHECKPOINT if not word.startswith(("compiler=", "runner=")))
"""For `accept`, which takes the format from the package."""


@pytest.fixture(scope="module")
def servers() -> Iterator[Backends]:
    with Backends() as started:
        yield started


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A machine of its own: home, configuration, cache and key.

    Attributes:
        place: Where its commands run.
        environ: More variables of its commands.
    """

    place: Workplace
    environ: Mapping[str, str]

    def ask(self, *arguments: str, code: int = 0) -> dict[str, Any]:
        """The JSON object of a command that must end with this exit code."""
        done = self.place.run(*arguments, "--json", **self.environ)
        assert done.returncode == code, done.stdout + done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer


def machine(place: Workplace, policy: Path, more: Mapping[str, str]) -> Machine:
    """A machine that signs with a new key, `own.key` in its home."""
    write_key_pair(generate_key(), place.root / "own.key")
    environ = {
        "ENGINESMITH_CONFIG": str(place.root / "config"),
        "ENGINESMITH_POLICY": str(policy),
        "ENGINESMITH_SIGNING_KEY": str(place.root / "own.key"),
        **more,
    }
    return Machine(place=place, environ=environ)


def contents(store: WritableStore, place: Place) -> dict[str, str]:
    """SHA-256 of all that a registry has of a version: package and statements."""
    found = {"manifest.json": store.read_manifest(place)}
    for file in files_of(manifest_at(store, place)[0]):
        with store.open_file(place, file) as chunks:
            found[file.path] = b"".join(chunks)
    for envelope in store.read_statements(place):
        for name, data in read_files(store, place, envelope.name).items():
            found[f"{envelope.name}/{name}"] = data
    return {name: hashlib.sha256(data).hexdigest() for name, data in found.items()}


@pytest.mark.parametrize("backend", backends)
def test_package_is_accepted_on_a_second_machine_after_it_was_published(
    backend: str, servers: Backends, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = servers.environ(backend)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    store = servers.store(backend, tmp_path / "registry")
    registry = ("--registry", store.url)
    policy = tmp_path / "policy.yaml"
    model = tiny_model(tmp_path / "model")
    builder = machine(make_workplace(tmp_path / "one", model), policy, environ)
    hardware = put_card(tmp_path / "card", "NVIDIA L4", (8, 9))
    judge = machine(
        make_workplace(tmp_path / "two", model),
        policy,
        {**environ, "PYTHONPATH": f"{hardware}:{ROOT}"},
    )
    keys = [
        {"name": name, "public_key": public.read_text(), "may_sign": rights}
        for name, public, rights in (
            ("builder", tmp_path / "one" / "own.key.pub", ["builds", "verdicts", "channels"]),
            ("judge", tmp_path / "two" / "own.key.pub", ["verdicts"]),
        )
    ]
    policy.write_text(json.dumps({"schema": 1, "keys": keys}))

    # Machine one has no card.
    built = builder.place.build(*CHECKPOINT, *PLAIN, *registry, **builder.environ)
    assert built.returncode == 0, built.stderr
    (place,) = store.places()
    reference = f"tiny:{place.version}"
    before = contents(store, place)
    signatures = [name for name in before if name.endswith((".dsse.json", "model.sig"))]
    assert len(signatures) == 4, "signature, provenance, engine, and the result of machine one"
    refused = judge.ask("pull", reference, "--to", "early", "--gpu", "l4", *registry, code=6)
    assert f"never run on {CARD}" in refused["message"]
    to_stable = ("promote", reference, "--channel", "stable", "--card", CARD, *registry)
    builder.ask(*to_stable, code=5)

    # Machine two has one, and never saw the build.
    accepted = judge.ask(
        *("accept", reference, *ON_CARD, *PLAIN, put_runner(hardware, judge.place.recipes)),
        *("--publish", *registry, "--config-dir", str(judge.place.recipes)),
    )
    assert (accepted["verdict"], accepted["digest"]) == ("accepted", before["manifest.json"])
    after = contents(store, place)
    assert {name: after[name] for name in before} == before
    (added,) = {name.partition("/")[0] for name in set(after) - set(before)}
    assert set(read_files(store, place, added)) == {
        "report.json", "report.html", "junit.xml", "statement.dsse.json",
    }  # fmt: skip
    verified = builder.ask("verify", reference, *registry)
    assert {
        one["card"]: (one["verdict"], one["signer"]["name"]) for one in verified["verdicts"]
    } == {
        CARD: ("accepted", "judge"),
        OTHER_CARD: ("checked", "builder"),
    }

    again = builder.place.build(*CHECKPOINT, *PLAIN, *registry, **builder.environ)
    assert f"Taken, published before: {place}" in again.stdout, again.stderr

    moved = builder.ask(*to_stable)
    assert (moved["card"], moved["verdict"], moved["changed"]) == (CARD, "accepted", True)
    assert contents(store, place) == after
    pulled = judge.ask("pull", "tiny", "--to", "out", "--gpu", "auto", *registry)
    assert (pulled["digest"], pulled["verdict"]) == (before["manifest.json"], "accepted")
    manifest = (judge.place.root / "out" / "manifest.json").read_bytes()
    assert hashlib.sha256(manifest).hexdigest() == before["manifest.json"]
    for gpu, card, code in (("rtx4090", OTHER_CARD, 3), ("h100", "NVIDIA-H100-80GB-HBM3", 5)):
        refused = judge.ask("pull", "tiny", "--to", gpu, "--gpu", gpu, *registry, code=6)
        assert CARD in refused["message"]
        assert not (judge.place.root / gpu).exists()
        builder.ask("promote", reference, "--card", card, *registry, code=code)
