"""A server that has, or lists, as much as it may: a command reads it in bounded memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.registry.store import ENVELOPE, KINDS, MAX_ENVELOPE_BYTES, MAX_SMALL_BYTES
from pipeline.registry.stores.oci.address import statement_tag
from pipeline.registry.stores.oci.image import ARTIFACT_TYPE, MANIFEST_TYPE, PACKAGE_MANIFEST
from pipeline.registry.stores.tree import moves_key, statements_key
from tests.hostile.test_server import MOST_BYTES, kind, run_child, server, world
from tests.hostile.world import World
from tests.registry.packages import VARIANT, place_of
from tests.registry.stores.faulty import Fault
from tests.registry.stores.s3_server import Stored

__all__ = ["kind", "server", "world"]
NONE = {"mediaType": "", "digest": f"sha256:{'0' * 64}", "size": 0}
Fill = Callable[[World, Any], None]


def junk(number: int, size_bytes: int) -> tuple[bytes, str]:
    """A document of a size, and its digest, which any name may end in."""
    data = json.dumps({"payload": f"{number}".ljust(size_bytes - 20, "A")}).encode()
    return data, hashlib.sha256(data).hexdigest()


def answering(server: Any, part: str, reply: Callable[[Any], None]) -> None:
    def answer(handler: Any) -> bool:
        reply(handler)
        return True

    def fault_for(seen: Any) -> Fault | None:
        return answer if part in seen.path else None

    server.fault_for = fault_for


def long_keys(world: World, server: Any) -> None:
    def page(handler: Any) -> None:
        number = int(handler.query.get("continuation-token") or 0)
        key = f"registry/tiny/{VARIANT}/0.1-aaaaaaaa-{'a' * 12}/{'x' * 980}{number}-"
        date = "<Size>1</Size><LastModified>2020-01-01T00:00:00Z</LastModified>"
        items = "".join(f"<Contents><Key>{key}{one}</Key>{date}</Contents>" for one in range(1000))
        more = f"<IsTruncated>{str(number < 100).lower()}</IsTruncated>"
        token = f"<NextContinuationToken>{number + 1}</NextContinuationToken>"
        body = f"<ListBucketResult>{items}{more}{token}</ListBucketResult>"
        handler.answer(200, body.encode(), "application/xml")

    answering(server, "list-type", page)


def pages(part: str, key: str, item: str, per_page: int = 1000, most: int = 80) -> Fill:
    """Pages of one list of an OCI registry; `%d` in an item is its number."""

    def fill(world: World, server: Any) -> None:
        def page(handler: Any) -> None:
            first = int(handler.query.get("from", 0))
            items = ",".join(item % one for one in range(first, first + per_page))
            link = f'<{handler.where}?from={first + per_page}>; rel="next"'
            more = {"Link": link} if first < most * per_page else {}
            kind = "application/vnd.oci.image.index.v1+json"
            handler.answer(200, f'{{"{key}": [{items}]}}'.encode(), kind, **more)

        answering(server, part, page)

    return fill


def manifests(variants: int, versions: int) -> Fill:
    """Manifests that are nearly as long as they may be, under names of good form."""

    def fill(world: World, server: Any) -> None:
        good = place_of(world.packages["good"]).version
        for number in range(variants * versions):
            data, digest = junk(number, (4 << 20) - 2000)
            version = good if versions == 1 else f"0.1-aaaaaaaa-{digest[:12]}"
            variant = f"v{number % variants}"
            if hasattr(server, "objects"):
                stored = Stored(data=data, etag='"x"')
                server.objects[f"registry/tiny/{variant}/{version}/manifest.json"] = stored
            else:
                value = {"artifactType": ARTIFACT_TYPE, "config": NONE, "layers": [NONE]}
                value |= {"annotations": {PACKAGE_MANIFEST: data.decode()}}
                entry = MANIFEST_TYPE, json.dumps(value).encode()
                server.manifests["engines/tiny", f"{variant}_{version}"] = entry

    return fill


def envelopes(world: World, server: Any) -> None:
    """As many statements and moves as are read, as long as they may be."""
    place = place_of(world.packages["good"])
    for number in range(4000):
        data, digest = junk(number, MAX_SMALL_BYTES)
        held = {f"{moves_key('tiny', VARIANT)}{digest}.dsse.json": data}
        for one in KINDS if number < 400 else ():
            limit_bytes = MAX_ENVELOPE_BYTES if one == "provenance" else MAX_SMALL_BYTES
            data, digest = junk(number, limit_bytes)
            held[f"{statements_key(place)}{one}-{digest[:16]}/{ENVELOPE}"] = data
        for key, data in held.items():
            server.objects[f"registry/{key}"] = Stored(data=data, etag='"x"')


def long_documents(world: World, server: Any) -> None:
    """In the place of every statement a manifest with as many layers as it may have."""
    layers = [{**NONE, "mediaType": "x" * 48}] * 24_000
    document = json.dumps({"artifactType": "x", "config": NONE, "layers": layers}).encode()
    assert len(document) < 4 << 20
    place, server.native = place_of(world.packages["good"]), False
    for number in range(200):
        tag = statement_tag(place, f"yank-{number:016x}")
        server.manifests["engines/tiny", tag] = MANIFEST_TYPE, document


PULL = "pull {good} --gpu rtx4090 --to {to}"
REFERRER = f'{{"mediaType": "{"x" * 3900}", "digest": "sha256:%064d", "size": 0}}'
CASES: list[tuple[str, str, Fill]] = [
    ("s3", "gc", long_keys),
    ("s3", "list", manifests(2, 20)),
    ("oci", "list", manifests(2, 20)),
    ("s3", "pull tiny:{version} --gpu rtx4090 --to {to}", manifests(40, 1)),
    ("s3", PULL, envelopes),
    ("s3", "list", envelopes),
    ("oci", "list", pages("tags/list", "tags", f'"%d{"x" * 4000}"')),
    ("oci", PULL, pages("referrers", "manifests", REFERRER)),
    ("oci", PULL, long_documents),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "text", "fill"), CASES, indirect=["kind"])
def test_what_a_server_has_fills_no_memory(
    world: World, server: Any, text: str, fill: Fill, tmp_path: Path
) -> None:
    fill(world, server)
    version = place_of(world.packages["good"]).version
    places = {**world._references(), "version": version, "to": tmp_path / "to"}
    words = [*text.format_map(places).split(), "--registry", world.store.url]
    code, _, peak_bytes = run_child(words, world._environ())
    assert peak_bytes < MOST_BYTES, f"{text}: exit {code}, {peak_bytes >> 20} MiB"
