"""Every file of a package, changed in every way: refused with the right code, nothing left."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.core.errors import CorruptError
from tests.registry.client.conftest import CHUNK_BYTES, Shop, noise

_FILES = {"config.json": b"{}", "model.plan": noise(3 * CHUNK_BYTES + 1), "rank1/model.plan": b"1"}
_PATHS = ["manifest.json", *(f"engine/{path}" for path in _FILES)]


def bit_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    _write(path, bytes(data))


def truncate(path: Path) -> None:
    _write(path, path.read_bytes()[:-1])


def grow(path: Path) -> None:
    _write(path, path.read_bytes() + b"\n")


def swap(path: Path) -> None:
    """Right size, another file's bytes where there is another one."""
    others = [one for one in sorted(path.parent.iterdir()) if one.is_file() and one != path]
    data = others[0].read_bytes() if others else b"2"
    size = path.stat().st_size
    _write(path, (data * (size // len(data) + 1))[:size])


def missing(path: Path) -> None:
    path.unlink()


def symlink(path: Path) -> None:
    kept = _outside(path)
    path.rename(kept)
    path.symlink_to(kept)


def linked_folder(path: Path) -> None:
    symlink(path.parent / "engine" if path.name == "manifest.json" else path.parent)


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def extra(path: Path) -> None:
    path.with_name(f"extra-{path.name}").write_text("nobody listed me")


def extra_undecodable(path: Path) -> None:
    Path(os.fsdecode(os.fsencode(path.parent) + b"/\xff")).write_text("")


def empty_folder(path: Path) -> None:
    path.with_name("empty").mkdir()


def extra_git(path: Path) -> None:
    folder = path.parent / ".git"
    folder.mkdir()
    (folder / "config").write_text("nobody listed me")


def hard_link(path: Path) -> None:
    os.link(path, _outside(path))


def _outside(path: Path) -> Path:
    root = path
    while root.name not in {"registry", "models"}:
        root = root.parent
    return root.parent / f"link-{path.name}"


def _write(path: Path, data: bytes) -> None:
    path.chmod(0o644)  # tests may run as root, for whom read-only is not
    path.write_bytes(data)


Change = Callable[[Path], None]
_CHANGES = [
    *(bit_flip, truncate, grow, swap, missing, symlink, fifo, hard_link),
    *(extra, extra_undecodable, extra_git, empty_folder, linked_folder),
]


@pytest.mark.parametrize("path", _PATHS)
@pytest.mark.parametrize("change", _CHANGES, ids=lambda change: change.__name__)
def test_a_change_in_a_filled_folder_is_refused_by_verify(
    shop: Shop, path: str, change: Change
) -> None:
    shop.publish(_FILES)
    shop.pull()
    assert shop.verify(shop.to).origin == "verified"
    change(shop.to / path)
    with pytest.raises(CorruptError) as raised:
        shop.verify(shop.to)
    str(raised.value).encode()  # can be printed, whatever the file is called
