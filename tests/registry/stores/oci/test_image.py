"""Layers, config and headers: pure."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.published import FileDigest
from pipeline.registry.store import Place
from pipeline.registry.stores.oci import image as images
from pipeline.registry.stores.oci.image import (
    MANIFEST_TYPE,
    MAX_LARGE_LAYERS,
    Descriptor,
    Layer,
    parse_image,
    plan_layer,
    plan_layers,
)
from pipeline.registry.stores.oci.writing import LAYER_TYPE, image_config, make_image

PLACE = Place(name="tiny", variant="any-checkpoint-fp8", version="1.0-01234567-0123456789ab")
MANIFEST = b'{"a":1}'
LARGE, END = images.LARGE_BYTES, bytes(1024)


def file(path: str, size_bytes: int = 3) -> FileDigest:
    return FileDigest(path=path, size_bytes=size_bytes, sha256="0" * 64)


def tar_of(layer: Layer, contents: dict[str, bytes]) -> bytes:
    parts = []
    for member in layer.members:
        data = contents[member.file.path]
        parts += [member.header, data, bytes(-len(data) % 512)]
    return b"".join(parts) + END


def layer_descriptor(digit: str) -> Descriptor:
    return Descriptor(media_type=LAYER_TYPE, digest=f"sha256:{digit * 64}", size=1024)


component = st.text(st.characters(categories=("L", "N")), min_size=1, max_size=60).map(
    lambda text: text.lower()
)
contents = st.dictionaries(
    st.lists(component, min_size=1, max_size=4).map(lambda parts: "engine/d/" + "/".join(parts)),
    st.binary(max_size=1500),
    max_size=6,
).filter(lambda found: not any(b.startswith(f"{a}/") for a in found for b in found))


@given(contents)
def test_a_tar_reader_finds_every_file_where_the_plan_says(found: dict[str, bytes]) -> None:
    files = [file(path, len(data)) for path, data in sorted(found.items())]
    (layer,) = plan_layers(MANIFEST, files)
    everything = {"manifest.json": MANIFEST, **found}
    data = tar_of(layer, everything)
    assert len(data) == layer.size_bytes
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        read = {one.name: one for one in tar}
    members = {f"models/{member.file.path}": member for member in layer.members}
    assert {name for name, one in read.items() if one.isreg()} == set(members)
    for name, one in read.items():
        assert (one.uid, one.gid, one.mtime) == (0, 0, 0)
        assert one.mode == (0o755 if one.isdir() else 0o444)
        if one.isreg():
            assert (one.offset_data, one.size) == (members[name].offset, len(everything[name[7:]]))
    folders = [name for name, one in read.items() if one.isdir()]
    assert folders[0] == "models"
    assert len(folders) == len(set(folders))


def test_equal_files_make_equal_layers_whatever_the_rest_of_the_package() -> None:
    # A published image never changes its digest, on any Python: this is the layer of such a file.
    data = tar_of(
        plan_layer([file("engine/tokenizer/a.json")]), {"engine/tokenizer/a.json": b"abc"}
    )
    digest = hashlib.sha256(data).hexdigest()
    assert digest == "dc3306caea906395662e9e202e5b05cb91787167398bfe1df979772f356ad25a"


@pytest.mark.parametrize(
    ("length", "size_bytes"),
    [(99, 0), (100, 0), (101, 0), (255, 8**11 - 1), (980, 8**11), (20, 40 << 30)],
)
def test_a_path_of_any_length_and_a_size_beyond_ustar_are_read_back(
    length: int, size_bytes: int
) -> None:
    path = "/".join(["p" * 50] * 20)[:length].rstrip("/")
    (member,) = plan_layer([file(path, size_bytes)]).members
    with tarfile.open(fileobj=io.BytesIO(member.header), mode="r:") as tar:
        one = next(one for one in iter(tar.next, None) if one.isreg())
    assert (one.name, one.size, one.offset_data) == (f"models/{path}", size_bytes, member.offset)


def test_each_large_file_has_a_layer_until_there_are_too_many() -> None:
    small = [file(f"engine/{n}.json", 10) for n in range(3)]
    large = [file(f"engine/{n:03}.bin", LARGE) for n in range(3)]
    layers = plan_layers(MANIFEST, [*small, *large, file("engine/z", LARGE - 1)])
    assert [[member.file.path for member in layer.members] for layer in layers] == [
        ["manifest.json", *(one.path for one in small), "engine/z"],
        *([one.path] for one in large),
    ]
    many = [file(f"engine/{n:03}.bin", LARGE) for n in range(2 * MAX_LARGE_LAYERS + 1)]
    layers = plan_layers(MANIFEST, many)
    assert len(layers) <= MAX_LARGE_LAYERS + 1
    assert [m.file for layer in layers[1:] for m in layer.members] == many


def test_the_image_is_valid_and_says_what_it_holds() -> None:
    layers = [layer_descriptor(digit) for digit in "ab"]
    config = image_config(layers)
    value = json.loads(config)
    assert value["rootfs"] == {"type": "layers", "diff_ids": [one.digest for one in layers]}
    assert len(value["history"]) == len(layers)
    document = make_image(PLACE, MANIFEST, config, layers)
    manifest = json.loads(document)
    assert manifest["schemaVersion"] == 2
    assert manifest["mediaType"] == MANIFEST_TYPE
    assert manifest["config"]["mediaType"] == "application/vnd.oci.image.config.v1+json"
    assert manifest["config"]["digest"] == f"sha256:{hashlib.sha256(config).hexdigest()}"
    assert {one["mediaType"] for one in manifest["layers"]} == {LAYER_TYPE}
    image = parse_image(document, "here")
    assert (image.manifest, image.layers) == (MANIFEST, tuple(layers))
    assert make_image(PLACE, MANIFEST, config, layers) == document
