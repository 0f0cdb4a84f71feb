"""Every file of a package, changed on a real S3 server and in a real OCI registry's own folder."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import ExitCode, PipelineError
from pipeline.core.values import Reference
from pipeline.registry.client.layout import verify_layout
from pipeline.registry.stores.oci import image, tagged, transport
from pipeline.registry.stores.oci.documents import Document
from pipeline.registry.stores.oci.referrers import list_referrers
from pipeline.registry.stores.opening import open_store
from pipeline.registry.stores.store import Place, WritableStore
from tests.registry.backends import Backends
from tests.registry.client.conftest import PIECE_BYTES, Shop, engine_files, noise
from tests.services.seaweed import BUCKET

pytestmark = pytest.mark.services

ShopOf = Callable[[str], Shop]

_SIZES = {
    "config.json": 700,
    "model.plan": 3 * PIECE_BYTES + 1,
    "rank1/model.plan": 3 * PIECE_BYTES + 1,
}
_PATHS = ["manifest.json", *(f"engine/{path}" for path in _SIZES)]
_SEEDS = itertools.count(1000)  # a registry keeps equal layers once: no test may share one


def bit_flip(data: bytes, other: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]


def truncate(data: bytes, other: bytes) -> bytes:
    return data[:-1]


def grow(data: bytes, other: bytes) -> bytes:
    return data + b"\n"


def swap(data: bytes, other: bytes) -> bytes:
    """Right size, another file's bytes."""
    return (other * (len(data) // len(other) + 1))[: len(data)]


Change = Callable[[bytes, bytes], bytes]
_CHANGES = [bit_flip, truncate, grow, swap]


@dataclass(frozen=True, kw_only=True)
class Behind:
    """What lies behind a store's back.

    Attributes:
        shop: Publishes to it and pulls from it.
        backend: `s3` or `oci`.
        server: The running server.
    """

    shop: Shop
    backend: str
    server: Any

    def fresh(self) -> WritableStore:
        """The same store for a reader that remembers nothing."""
        return open_store(self.shop.store.url)

    def published(self) -> tuple[Reference, dict[str, bytes]]:
        """A package, and its files by path."""
        made = {path: noise(size, next(_SEEDS)) for path, size in _SIZES.items()}
        engine = self.shop.engine(files=made)
        reference = self.shop.publish(engine)
        manifest = self.fresh().read_manifest(Place.of(reference))
        files = {f"engine/{path}": data for path, data in made.items()}
        return reference, {"manifest.json": manifest, **files}

    def key(self, reference: Reference, path: str) -> str:
        """Of an object in S3."""
        root = self.shop.store.url.removeprefix(f"s3://{BUCKET}/")
        return f"{root}/{reference.name}/{reference.variant}/{reference.version}/{path}"

    def blob(self, data: bytes) -> Path:
        """The blob of the registry that has these bytes of a file."""
        (found,) = (path for path in self._blobs() if data in path.read_bytes())
        return found

    def put(self, reference: Reference, path: str, old: bytes, new: bytes) -> None:
        """Write other bytes over a file, past the store."""
        if self.backend == "s3":
            key = self.key(reference, path)
            assert self.server.client().get_object(Bucket=BUCKET, Key=key)["Body"].read() == old
            self.server.client().put_object(Bucket=BUCKET, Key=key, Body=new)
            return
        blob = self.blob(old)
        before, _, after = blob.read_bytes().partition(old)
        blob.write_bytes(before + new + after)

    def remove(self, reference: Reference, path: str, data: bytes) -> None:
        if self.backend == "s3":
            self.server.client().delete_object(Bucket=BUCKET, Key=self.key(reference, path))
        else:
            self.blob(data).unlink()

    def _blobs(self) -> list[Path]:
        return sorted((self.server.folder / "data").rglob("blobs/sha256/*/*/data"))

    def refused(self, *codes: ExitCode) -> None:
        """A pull ends with one of these codes, and nothing is left."""
        with pytest.raises(PipelineError) as caught:
            self.shop.pull(store=self.fresh())
        assert caught.value.exit_code in codes, caught.value
        assert self.shop.left() == []


@pytest.fixture
def behind_of(
    shop_of: ShopOf, running: Backends, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Behind]:
    """Behind a store of a kind."""
    monkeypatch.setattr(image, "LARGE_BYTES", 2 * PIECE_BYTES)  # a layer for each plan
    monkeypatch.setattr(transport, "BACKOFF_S", 0.001)
    monkeypatch.setattr(tagged, "SETTLE_S", 0.01)  # nobody else writes

    def make(backend: str) -> Behind:
        return Behind(shop=shop_of(backend), backend=backend, server=running._server(backend))

    return make


@pytest.fixture(params=["s3", "oci"])
def behind(request: pytest.FixtureRequest, behind_of: Callable[[str], Behind]) -> Behind:
    """Behind a store of each kind."""
    return behind_of(request.param)


@pytest.mark.parametrize("path", _PATHS)
@pytest.mark.parametrize("change", _CHANGES, ids=lambda change: change.__name__)
def test_a_changed_file_on_the_server_is_refused_and_nothing_is_left(
    behind: Behind, path: str, change: Change
) -> None:
    reference, files = behind.published()
    other = files["engine/config.json" if path != "engine/config.json" else "engine/model.plan"]
    behind.put(reference, path, files[path], change(files[path], other))
    if behind.backend == "oci" and change is grow and path != "manifest.json":
        # A tar's layout follows from the manifest: what is after a file in it is never asked for.
        behind.shop.pull(store=behind.fresh())
        assert engine_files(behind.shop.to)[path.removeprefix("engine/")] == files[path]
        return
    behind.refused(ExitCode.CORRUPT)


@pytest.mark.parametrize("path", _PATHS)
def test_a_missing_file_on_the_server_is_refused_and_nothing_is_left(
    behind: Behind, path: str
) -> None:
    reference, files = behind.published()
    behind.remove(reference, path, files[path])
    # In an OCI registry small files share a layer with the manifest.
    gone = path == "manifest.json" or (behind.backend, path) == ("oci", "engine/config.json")
    behind.refused(ExitCode.NOT_FOUND if gone else ExitCode.CORRUPT)


@pytest.mark.parametrize("path", ["engine/extra.bin", "engine/.git/config", "extra.json"])
def test_what_the_manifest_does_not_list_on_the_server_does_not_travel(
    behind_of: Callable[[str], Behind], path: str
) -> None:
    behind = behind_of("s3")
    reference, _ = behind.published()
    key = behind.key(reference, path)
    behind.server.client().put_object(Bucket=BUCKET, Key=key, Body=b"nobody listed me")
    behind.shop.pull(store=behind.fresh())
    assert verify_layout(behind.shop.to).digest == reference.digest
    assert not (behind.shop.to / path).exists()


def test_a_layer_more_in_an_image_is_refused(behind_of: Callable[[str], Behind]) -> None:
    """Whoever can write tags adds a file to the image of a package."""
    behind = behind_of("oci")
    reference, _ = behind.published()
    store: Any = behind.fresh()
    repository = store._repository("tiny")
    found = store._require(Place.of(reference))
    value = found.document.data.replace(b'"layers":[', b'"layers":[' + _layer(found) + b",")
    assert value != found.document.data
    for tag in repository.tags():
        if repository.manifest(tag).digest == found.document.digest:
            repository.put_manifest(tag, Document(media_type=found.document.media_type, data=value))
    behind.refused(ExitCode.CORRUPT)


def test_a_tag_moved_to_another_package_is_refused(behind_of: Callable[[str], Behind]) -> None:
    behind = behind_of("oci")
    reference, _ = behind.published()
    second = behind.shop.publish(
        behind.shop.engine(files={"model.plan": noise(9, 9)}), version="2.0", verdict=None
    )
    store: Any = behind.fresh()
    repository = store._repository("tiny")
    wanted = store._require(Place.of(reference)).document
    other = store._require(Place.of(second)).document
    moved = [tag for tag in repository.tags() if repository.manifest(tag).digest == wanted.digest]
    for tag in moved:
        repository.put_manifest(tag, other)
    assert moved
    behind.refused(ExitCode.CORRUPT)


@pytest.mark.parametrize("change", [bit_flip, truncate], ids=lambda change: change.__name__)
@pytest.mark.parametrize("file", ["manifest.dsse.json", "test-result.dsse.json", "report.json"])
def test_a_changed_signature_or_verdict_on_the_server_is_refused(
    behind: Behind, file: str, change: Change
) -> None:
    reference, _ = behind.published()
    place = Place.of(reference)
    store: Any = behind.fresh()
    for statement in store.statements(place):
        data = store.read_statement(place, statement.name).get(file)
        if data is not None:
            break
    else:
        pytest.fail(f"no statement has {file}")
    if behind.backend == "oci":
        repository = store._repository(reference.name)
        image_digest = store._require(place).document.digest
        (blob,) = (
            behind.server.blob_path(one.files[file].digest)
            for one in list_referrers(repository, image_digest)
            if one.name == statement.name
        )
        assert blob.read_bytes() == data
        blob.write_bytes(change(data, b""))
    else:
        client = behind.server.client()
        folder = behind.key(reference, "").rstrip("/")
        key = f"{folder}.statements/{statement.name}.statement"
        before, found, after = (
            client.get_object(Bucket=BUCKET, Key=key)["Body"].read().partition(data)
        )
        assert found
        client.put_object(Bucket=BUCKET, Key=key, Body=before + change(data, b"") + after)
    codes = [ExitCode.CORRUPT, ExitCode.UNTRUSTED]
    if file != "manifest.dsse.json":
        codes.append(ExitCode.INCOMPATIBLE)  # without its verdict the package is unproven
    behind.refused(*codes)


def _layer(found: Any) -> bytes:
    layer = found.layers[-1]
    kind = layer.media_type
    text = f'{{"digest":"{layer.digest}","mediaType":"{kind}","size":{layer.size_bytes}}}'
    return text.encode()
