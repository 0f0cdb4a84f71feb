"""Headers that are read and written agree with the safetensors library; broken ones are refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.errors import CorruptError
from pipeline.core.safetensors_files import (
    DTYPES,
    INDEX,
    SINGLE,
    TensorSpec,
    folder_tensors,
    read_header,
    safetensors_header,
)
from tests.sources.tiny_model import BROKEN_SAFETENSORS, safetensors

_WHOLE_BYTES = sorted(name for name, dtype in DTYPES.items() if dtype.bits % 8 == 0)
_SPECS = st.lists(
    st.builds(
        TensorSpec,
        st.text(min_size=1).filter(lambda name: name != "__metadata__"),
        st.sampled_from(_WHOLE_BYTES),
        st.lists(st.integers(0, 5), max_size=3).map(tuple),
    ),
    max_size=6,
    unique_by=lambda spec: spec.name,
)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["a", "dtype", "shape", "data_offsets", "__metadata__"]), inner
        )
    ),
    max_leaves=12,
)


def written(specs: list[TensorSpec], metadata: dict[str, str] | None = None) -> bytes:
    return safetensors_header(specs, metadata) + b"\1" * sum(spec.size_bytes for spec in specs)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("headers") / "x.safetensors"


@settings(max_examples=60, deadline=None)
@given(specs=_SPECS, metadata=st.none() | st.dictionaries(st.text(), st.text(), max_size=2))
def test_written_header_is_read_back_by_us_and_by_the_library(
    path: Path, specs: list[TensorSpec], metadata: dict[str, str] | None
) -> None:
    from safetensors import safe_open

    path.write_bytes(written(specs, metadata))
    found = read_header(path)
    assert [(e.name, e.dtype, e.shape, e.size_bytes) for e in found.values()] == [
        (spec.name, spec.dtype, tuple(spec.shape), spec.size_bytes) for spec in specs
    ]
    with safe_open(path, "np") as theirs:
        assert sorted(theirs.keys()) == sorted(found)
        for spec in specs:
            assert theirs.get_slice(spec.name).get_shape() == list(spec.shape)
            assert theirs.get_slice(spec.name).get_dtype() == DTYPES[spec.dtype].tag
    data_start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert data_start % 8 == 0


@settings(max_examples=150, deadline=None)
@given(header=_JSON, data=st.binary(max_size=12))
def test_any_json_header_is_read_or_refused_as_corrupt(
    path: Path, header: object, data: bytes
) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    try:
        found = read_header(path)
    except CorruptError:
        return
    assert sum(entry.size_bytes for entry in found.values()) == len(data)


@settings(max_examples=150, deadline=None)
@given(specs=_SPECS, at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_flipped_bit_of_the_header_is_read_or_refused_as_corrupt(
    path: Path, specs: list[TensorSpec], at: float, bit: int
) -> None:
    content = bytearray(written(specs))
    content[int(at * len(safetensors_header(specs)))] ^= 1 << bit
    path.write_bytes(content)
    try:
        found = read_header(path)
    except CorruptError:
        return
    assert all(entry.offset + entry.size_bytes <= len(content) for entry in found.values())


def test_no_truncation_goes_unnoticed(path: Path) -> None:
    whole = safetensors({"a": 20, "b": 3})
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptError):
            read_header(path)


@pytest.mark.parametrize("fault", BROKEN_SAFETENSORS)
def test_broken_file_is_refused_by_us_and_by_the_library(path: Path, fault: str) -> None:
    from safetensors import SafetensorError, safe_open

    content, words = BROKEN_SAFETENSORS[fault]
    path.write_bytes(content)
    with pytest.raises(CorruptError, match=words):
        read_header(path)
    if fault != "duplicate-tensor":  # the library keeps the last and says nothing
        with pytest.raises(SafetensorError):
            safe_open(path, framework="np")


def fill(folder: Path, files: dict[str, list[str]], index: dict[str, str] | None) -> None:
    """One-byte tensors by file, and an index if there is one."""
    for file, names in files.items():
        (folder / file).write_bytes(safetensors(dict.fromkeys(names, 1)))
    if index is not None:
        (folder / INDEX).write_text(json.dumps({"weight_map": index}))


_TWO = {"s1.safetensors": ["a"], "s2.safetensors": ["b"]}


@pytest.mark.parametrize(
    ("files", "index", "used", "ignored"),
    [
        ({**_TWO, "stale.safetensors": ["a", "c"]}, {"a": "s1", "b": "s2"}, "ab", "stale"),
        ({**_TWO, SINGLE: ["a", "b"]}, {"a": "s1", "b": "s2"}, "ab", SINGLE),
        ({SINGLE: ["a"], "s1.safetensors": ["a", "b"]}, None, "a", "s1.safetensors"),
        ({**_TWO, "consolidated.safetensors": ["a"]}, None, "ab", "consolidated.safetensors"),
        ({**_TWO, "consolidated.00.safetensors": ["z"]}, {"a": "s1", "b": "s2"}, "ab", "00"),
        ({"s1.safetensors": ["a", "b"]}, {"a": "s1"}, "ab", ""),
        (_TWO, None, "ab", ""),
    ],
)
def test_index_decides_which_files_count_and_the_rest_is_named(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    files: dict[str, list[str]],
    index: dict[str, str] | None,
    used: str,
    ignored: str,
) -> None:
    named = index and {name: f"{shard}.safetensors" for name, shard in index.items()}
    fill(tmp_path, files, named)
    with caplog.at_level(logging.WARNING):
        found = folder_tensors(tmp_path)
    assert sorted(found) == list(used)
    assert all("stale" not in e.file.name and e.file.name != ignored for e in found.values())
    assert bool(caplog.messages) == bool(ignored)
    assert all(ignored in message for message in caplog.messages)


@pytest.mark.parametrize(
    ("files", "index", "words"),
    [
        ({}, None, "holds no *.safetensors"),
        (_TWO, {"a": "s1.safetensors", "b": "s3.safetensors"}, "1 of the 2 files"),
        (_TWO, {"a": "s2.safetensors", "b": "s2.safetensors"}, "a is missing, although"),
        (_TWO, {"a": "../s1.safetensors"}, "wanted *.safetensors beside it"),
        ({**_TWO, "s3.safetensors": ["a"]}, None, "a is in s1.safetensors and in s3.safetensors"),
    ],
)
def test_files_that_do_not_fit_together_are_refused(
    tmp_path: Path, files: dict[str, list[str]], index: dict[str, str] | None, words: str
) -> None:
    fill(tmp_path, files, index)
    with pytest.raises(CorruptError) as refused:
        folder_tensors(tmp_path)
    assert words in str(refused.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": {"a": 1}}', "[" * 100_000])
def test_broken_index_is_corrupt_and_named(tmp_path: Path, text: str) -> None:
    fill(tmp_path, _TWO, None)
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CorruptError, match=INDEX):
        folder_tensors(tmp_path)
