"""A new kind of store is one file and one conf file: recipes, commands and pulls find it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pipeline.core.errors import RecipeError
from pipeline.registry import stores
from pipeline.registry.client.machine import Flags
from pipeline.registry.client.pull import PullRequest
from pipeline.registry.client.pull import run as pull
from pipeline.registry.inventory import entries
from pipeline.registry.reference import reference_of
from pipeline.registry.trust.verification import Terms
from tests.contract.test_change_cost_formats import put, recipe
from tests.registry.packages import place_of
from tests.registry.team import Team

STORE = """\
import contextlib
import hashlib
import time
from pydantic.dataclasses import dataclass

from pipeline.core.settings import STRICT
from pipeline.registry.stores.publication import WritableTree
from pipeline.registry.stores.tree import Found

HELD = {}


class ToyObjects:
    def __init__(self, url):
        self.url = url
        self.held = HELD.setdefault(url, {})

    def find(self, key):
        if key in self.held:
            return Found(key=key, size_bytes=len(self.held[key]), modified_s=0.0)

    def listed(self, prefix):
        return [self.find(key) for key in sorted(self.held) if key.startswith(prefix)]

    def read(self, key, limit_bytes):
        return self.held.get(key)

    @contextlib.contextmanager
    def stream(self, key, offset, end):
        yield iter([self.held[key][offset:end]])

    def create(self, key, data):
        return self.held.setdefault(key, data) is data

    def replace(self, key, data):
        self.held[key] = data

    def put_file(self, key, source, file, on_bytes):
        self.held[key] = source.read_bytes()

    def delete(self, keys):
        for key in keys:
            self.held.pop(key, None)

    def now_s(self):
        return time.time()

    def unfinished(self, min_age_s, *, delete):
        return []

    def check_writable(self):
        pass


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ToyRegistry:
    url: str

    def store(self):
        return WritableTree(objects=ToyObjects(self.url))

    reader = store


KIND = ToyRegistry
"""


def test_a_store_is_one_file_and_one_conf_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, {"stores/toy.py": STORE, "conf/registry/toy.yaml": "kind: toy\nurl: toy://box\n"})
    monkeypatch.setattr(stores, "__path__", [*stores.__path__, str(tmp_path / "stores")])
    monkeypatch.setenv("ENGINESMITH_CACHE", str(tmp_path / "cache"))
    try:
        store = recipe(tmp_path, "registry=toy").registry.store()
        store.check_writable()
        team = Team(dir=tmp_path, store=store)
        package = team.publish(verdict="accepted")
        terms = Terms(policy=team.policy)
        assert [one.place for one in entries(stores.open_store("toy://box"), terms)] == [
            place_of(package)
        ]
        request = PullRequest(
            reference=str(reference_of(package)),
            registry="toy://box",
            to=tmp_path / "pulled",
            policy=team.policy_file(),
            flags=Flags(gpu="rtx4090"),
        )
        assert pull(request).digest == package.digest
        with pytest.raises(RecipeError, match="toy://"):
            stores.open_store("ftp://box")
    finally:
        sys.modules.pop("pipeline.registry.stores.toy", None)
