from __future__ import annotations

import dataclasses
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.errors import CorruptError
from pipeline.core.published import FileDigest
from pipeline.core.values import Engine, Licence, Limits, Weights
from pipeline.registry.manifest import (
    MAX_MANIFEST_BYTES,
    digest_bytes,
    manifest_bytes,
    parse_manifest,
    path_fault,
    paths_fault,
    read_manifest,
)
from pipeline.registry.package import Label, make_manifest

_GOLDEN = Path(__file__).parent / "golden" / "manifest.json"
_GOLDEN_DIGEST = "da7118f10d5f2382428b9e7fc6ffacee61d8fb1f8c577432f9f87fc8757edfbd"

_ENGINE = Engine(
    dir=Path("nowhere"),
    digest="e" * 64,
    format="trtllm",
    variant="rtx4090-trtllm-fp8-b64-s4096",
    runtime=("tensorrt-llm", "1.2.1"),
    sms=(89,),
    limits=Limits(max_batch_size=64, max_seq_len=4096, max_num_tokens=8192, kv_cache_dtype="fp8"),
    min_vram_bytes=9_663_676_416,
    serve_args=("--max_batch_size", "64"),
    tools={"tensorrt-llm": "1.2.1", "nvidia-modelopt": "0.47.0"},
)
_WEIGHTS = Weights(
    dir=Path("nowhere"),
    origin="hub:microsoft/Phi-3-mini-4k-instruct",
    commit="f39ac1d28e925b323eae81227eaba4464caced4e",
    files=(FileDigest(path="config.json", size_bytes=2, sha256="c" * 64),),
    licence=Licence(spdx="MIT", files=("LICENSE",)),
)
_FILES = (
    FileDigest(path="engine/rank0.engine", size_bytes=4_096_000_000, sha256="1" * 64),
    FileDigest(path="engine/LICENSE", size_bytes=1084, sha256="2" * 64),
    FileDigest(path="engine/config.json", size_bytes=0, sha256="3" * 64),
)
_LABEL = Label(
    name="phi3",
    recipe_version="1.0",
    quantization="fp8",
    ledger={"linears": 224},
    build_key="0123456789ab" + "0" * 52,
    config={"quantizer": {"calib_size": 512, "note": "é"}, "learning": 0.125, "nothing": None},
    cards=("NVIDIA-GeForce-RTX-4090",),
    cuda="13.0",
    driver_min="580.65.06",
)


def test_manifest_equals_its_golden_file() -> None:
    """A new golden means a new schema: every published digest depends on these bytes."""
    data = manifest_bytes(make_manifest(_ENGINE, _WEIGHTS, _LABEL, _FILES))
    assert data == _GOLDEN.read_bytes()
    assert digest_bytes(data) == _GOLDEN_DIGEST
    manifest, digest = read_manifest(_GOLDEN)
    assert (manifest_bytes(manifest), digest) == (data, _GOLDEN_DIGEST)


def test_manifest_does_not_depend_on_the_order_of_its_inputs() -> None:
    turned = dataclasses.replace(_LABEL, config=dict(list(_LABEL.config.items())[::-1]))
    again = make_manifest(_ENGINE, _WEIGHTS, turned, _FILES[::-1])
    assert manifest_bytes(again) == _GOLDEN.read_bytes()


_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=3)
    ),
    max_leaves=8,
)


def _unsafe(value: Any) -> bool:
    """RFC 8785 writes a float such as 1e17 as an integer, which not every reader keeps exact."""
    if isinstance(value, dict):
        return any(_unsafe(inner) for inner in value.values())
    if isinstance(value, list):
        return any(_unsafe(inner) for inner in value)
    return isinstance(value, float) and 2**53 <= abs(value) < 1e21


@given(config=st.dictionaries(st.sampled_from("abc"), _json))
def test_manifest_that_can_be_made_can_be_read(config: dict[str, Any]) -> None:
    label = dataclasses.replace(_LABEL, config=config)
    if any(_unsafe(value) for value in config.values()):
        with pytest.raises(CorruptError, match="exceeds safe integer"):
            make_manifest(_ENGINE, _WEIGHTS, label, _FILES)
        return
    manifest = make_manifest(_ENGINE, _WEIGHTS, label, _FILES)
    data = manifest_bytes(manifest)
    assert parse_manifest(data, "it") == manifest
    assert manifest["build"]["config"] == config


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2**53, Path("x"), "\udc80"])
def test_value_without_canonical_json_is_refused(value: Any) -> None:
    label = dataclasses.replace(_LABEL, config={"x": value})
    with pytest.raises(CorruptError, match="cannot hold this"):
        make_manifest(_ENGINE, _WEIGHTS, label, _FILES)


def _golden() -> dict[str, Any]:
    value: dict[str, Any] = json.loads(_GOLDEN.read_bytes())
    return value


def _set(*path: Any, to: Any) -> Callable[[], bytes]:
    def make() -> bytes:
        value: Any = _golden()
        inner = value
        for step in path[:-1]:
            inner = inner[step]
        inner[path[-1]] = to
        return rfc8785.dumps(value)

    return make


def _raw(old: bytes, new: bytes) -> Callable[[], bytes]:
    def make() -> bytes:
        data = _GOLDEN.read_bytes()
        assert old in data
        return data.replace(old, new, 1)

    return make


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda: b"[]", "not a JSON object"),
        (lambda: _GOLDEN.read_bytes()[:-1], "not a manifest"),
        (lambda: _GOLDEN.read_bytes() + b"\n", "not RFC 8785"),
        (lambda: b'{"a":' * 100_000, "not a manifest"),
        (_raw(b'"name":"phi3"', b'"name":"phi3","name":"phi3"'), "not RFC 8785"),
        (_raw(b'"size":1084', b'"size":NaN'), "not a manifest"),
        (_raw(b'"size":1084', b'"size":9223372036854775808'), "not a manifest"),
        (_set("schema", to=2), "schema 2"),
        (_set("files", 0, "size", to=-1), r"files\.0\.size"),
        (_set("files", 0, "sha256", to="2" * 64 + "\n"), "sha256"),
        (_set("files", 0, "path", to="LICENSE"), "not below engine"),
        (_set("files", 1, "path", to="engine/LICENSE"), "twice"),
        (_set("files", 0, "path", to="engine/zzz"), "not sorted"),
        (_set("name", to="../x"), "not a name"),
        (_set("recipe_version", to="stable"), "not a recipe version"),
        (_set("k" * 100_000, to=1), "kkk"),
        (_set("schema", to="s" * 100_000), "sss"),
    ],
)
def test_bad_manifest_is_corrupt(make: Callable[[], bytes], fault: str, tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(make())
    with pytest.raises(CorruptError, match=fault) as raised:
        read_manifest(path)
    assert raised.value.exit_code == 4
    assert len(str(raised.value)) < 1000


def test_manifest_above_the_limit_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    with path.open("wb") as stream:
        stream.truncate(1 << 40)  # sparse: reading it whole would take a TiB of memory
    with pytest.raises(CorruptError, match=f"longer than {MAX_MANIFEST_BYTES} bytes"):
        read_manifest(path)


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        ("", "empty"),
        ("/etc/passwd", "absolute"),
        ("engine/../../x", "'..'"),
        ("engine/./x", "'.'"),
        ("engine/", "''"),
        ("engine\\x", r"character '\\'"),
        ("engine/a:b", "character ':'"),
        ("engine/CON", "Windows"),
        ("engine/a.", "Windows"),
        ("engine/a\0b", "unprintable"),
        ("engine/\udc80", "Unicode"),
        ("engine/" + unicodedata.normalize("NFD", "é"), "NFC"),
        ("engine/" + "x" * 256, "component longer"),
        ("engine/" + "é" * 128, "component longer"),
        ("/".join(["x" * 200] * 6), "longer than 1024"),
    ],
)
def test_unsafe_path_is_refused(path: str, fault: str) -> None:
    assert fault in path_fault(path)


@pytest.mark.parametrize(
    ("paths", "fault"),
    [
        (["a", "a"], "twice"),
        (["a/B", "a/b"], "one file on some systems"),
        (["a/x", "A/y"], "one file on some systems"),
        (["straße", "STRASSE"], "one file on some systems"),
        (["a", "a/b"], "both a file and a folder"),
    ],
)
def test_colliding_paths_are_refused(paths: list[str], fault: str) -> None:
    assert fault in paths_fault(paths)


@given(st.text())
def test_accepted_path_stays_below_its_folder(path: str) -> None:
    if path_fault(path) == "":
        parts = PurePosixPath("root", path).parts
        assert parts[0] == "root"
        assert ".." not in parts
        assert str(PurePosixPath(path)) == path


def test_ordinary_paths_are_accepted() -> None:
    assert paths_fault(["engine/config.json", "engine/.gitattributes", "engine/日本語/x y"]) == ""
