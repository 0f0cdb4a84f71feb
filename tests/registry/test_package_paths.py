from __future__ import annotations

import unicodedata
from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.registry.manifest import path_fault, paths_fault


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        ("", "empty"),
        ("/etc/passwd", "absolute"),
        ("engine/../../x", "'..'"),
        ("engine/./x", "'.'"),
        ("engine//x", "''"),
        ("engine/", "''"),
        ("engine\\x", r"character '\\'"),
        ("engine/a:b", "character ':'"),
        ("engine/CON", "Windows"),
        ("engine/nul.txt", "Windows"),
        ("engine/a.", "Windows"),
        ("engine/a ", "Windows"),
        ("engine/a\0b", "unprintable"),
        ("engine/a\x1b[31m", "unprintable"),
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
