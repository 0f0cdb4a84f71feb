"""Tar headers that depend on a path and a size only, so that equal files make equal layers.

POSIX ustar (IEEE 1003.1-2017, `pax`), mode 0444 (folders 0755), owner 0, time 0. A pax header comes
first only where ustar has no room: a path that is not ASCII or longer than 100 bytes, a size of
8 GiB or more.
"""

from __future__ import annotations

BLOCK_BYTES = 512
END = bytes(2 * BLOCK_BYTES)
"""Two zero blocks end an archive."""

_NAME_BYTES = 100
_MAX_SIZE_BYTES = 8**11 - 1  # eleven octal digits
_FILE, _FOLDER, _PAX = b"0", b"5", b"x"


def file_header(path: str, size_bytes: int) -> bytes:
    """What precedes a file's bytes.

    Args:
        path: Relative, POSIX.
        size_bytes: Of the file.
    """
    return _pax(path, size_bytes) + _block(_FILE, path, size_bytes, mode=0o444)


def folder_header(path: str) -> bytes:
    """The entry of a folder.

    Args:
        path: Relative, POSIX, without a slash at its end.
    """
    path = f"{path}/"
    return _pax(path, 0) + _block(_FOLDER, path, 0, mode=0o755)


def padding_bytes(size_bytes: int) -> int:
    """How many zero bytes fill a file's last block."""
    return -size_bytes % BLOCK_BYTES


def _pax(path: str, size_bytes: int) -> bytes:
    records = b""
    if not path.isascii() or len(path) > _NAME_BYTES:
        records += _record("path", path)
    if size_bytes > _MAX_SIZE_BYTES:
        records += _record("size", str(size_bytes))
    if not records:
        return b""
    header = _block(_PAX, "PaxHeader", len(records), mode=0o444)
    return header + records + bytes(padding_bytes(len(records)))


def _record(key: str, value: str) -> bytes:
    """`<length> <key>=<value>` and a newline, where the length counts itself."""
    rest = f" {key}={value}\n".encode()
    length = len(rest)
    while len(str(length)) + len(rest) != length:
        length = len(str(length)) + len(rest)
    return str(length).encode() + rest


def _block(kind: bytes, path: str, size_bytes: int, *, mode: int) -> bytes:
    # What does not fit is in the pax header, which readers take instead.
    name = path.encode("ascii", "replace")[:_NAME_BYTES]
    size = size_bytes if size_bytes <= _MAX_SIZE_BYTES else 0
    fields = [
        name.ljust(_NAME_BYTES, b"\0"),
        b"%07o\0" % mode,
        b"%07o\0" % 0,  # user
        b"%07o\0" % 0,  # group
        b"%011o\0" % size,
        b"%011o\0" % 0,  # time
        b" " * 8,  # checksum, as it counts while it is computed
        kind,
        bytes(100),  # link
        b"ustar\x0000",
        bytes(32 + 32),  # names of user and group
        b"%07o\0" % 0 * 2,  # device
        bytes(155 + 12),  # prefix, padding
    ]
    block = b"".join(fields)
    checksum = b"%06o\0 " % sum(block)
    return block[:148] + checksum + block[156:]
