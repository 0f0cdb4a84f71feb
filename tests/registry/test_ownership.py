"""Which files another user of this machine could replace."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from pipeline.core.errors import AccessError
from pipeline.registry.disk import require_unshared, writable_by_others


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir(mode=0o700)
    path = tmp_path / "folder" / "file"
    path.write_text("x")
    path.chmod(0o644)
    return path


def test_ours_is_taken_and_what_others_may_write_or_rename_in_is_refused(file: Path) -> None:
    require_unshared(file)
    require_unshared(file.parent)
    for path, mode in ((file, 0o646), (file.parent, 0o707)):
        path.chmod(mode)
        with pytest.raises(AccessError, match=f"chmod go-w {path}"):
            require_unshared(file)
        path.chmod(0o700)


@pytest.mark.parametrize(
    ("mode", "user", "group", "reason"),
    [
        (0o644, 0, 0, ""),
        (0o664, 0, os.geteuid(), ""),  # the user's own group, as useradd makes it
        (0o664, os.geteuid(), 12345, "group 12345"),
        (0o646, os.geteuid(), 12345, "everyone"),
        (0o600, 12345, 0, "belongs to user 12345"),
    ],
)
def test_owner_group_and_mode_tell_who_may_write(
    mode: int, user: int, group: int, reason: str
) -> None:
    status = os.stat_result((stat.S_IFREG | mode, 1, 1, 1, user, group, 0, 0, 0, 0))
    found = writable_by_others(status)
    assert found.endswith(reason)
    assert bool(found) is bool(reason)


def test_a_sticky_folder_is_fine_above_what_is_ours_and_not_itself(file: Path) -> None:
    file.parent.chmod(0o1777)
    require_unshared(file)
    with pytest.raises(AccessError):
        require_unshared(file.parent)


def test_a_link_counts_where_it_lies_and_where_it_leads(file: Path, tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "link").symlink_to(file)
    require_unshared(tmp_path / "open" / "link")
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(AccessError, match="open"):
        require_unshared(tmp_path / "open" / "link")
    (tmp_path / "link").symlink_to(file)
    file.chmod(0o666)
    with pytest.raises(AccessError, match="go-w"):
        require_unshared(tmp_path / "link")
