"""Every file of a signed package, changed in every way: refused, with the right exit code."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.core.errors import CorruptError, ExitCode, PipelineError
from pipeline.core.values import Reference
from pipeline.registry.signing.command import Request, run_verify
from tests.registry.signing.conftest import Signed

FILES = ("manifest.json", "engine/model.plan", "engine/tokenizer/tokenizer.json")
Change = Callable[[Path, Path], None]


def _rewrite(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)


def _flip(package: Path, path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    _rewrite(path, bytes(data))


def _truncate(package: Path, path: Path) -> None:
    _rewrite(path, path.read_bytes()[:-1])


def _grow(package: Path, path: Path) -> None:
    _rewrite(path, path.read_bytes() + b"\n")


def _swap(package: Path, path: Path) -> None:
    """Exchange it with the next file."""
    other = package / FILES[(FILES.index(path.relative_to(package).as_posix()) + 1) % len(FILES)]
    path.rename(aside := package.parent / "aside")
    other.rename(path)
    aside.rename(other)


def _extra(package: Path, path: Path) -> None:
    (path.parent / "extra.so").write_bytes(b"x")


def _extra_hidden(package: Path, path: Path) -> None:
    (path.parent / ".git").mkdir()
    (path.parent / ".git" / "config").write_bytes(b"x")


def _missing(package: Path, path: Path) -> None:
    path.unlink()


def _symlink(package: Path, path: Path) -> None:
    path.rename(package.parent / "aside")
    path.symlink_to(package.parent / "aside")


def _hard_link(package: Path, path: Path) -> None:
    os.link(path, package.parent / "aside")


CHANGES: tuple[Change, ...] = (
    _flip, _truncate, _grow, _swap, _extra, _extra_hidden, _missing, _symlink, _hard_link,
)  # fmt: skip


def _refusal(signed: Signed, reference: Reference, by_name: bool) -> PipelineError:
    if not by_name:
        with pytest.raises(PipelineError) as caught:
            signed.verify(reference)
        return caught.value
    request = Request(
        target=str(reference),
        registry=str(signed.bench.registry.path),
        policy=signed.write_policy(),
    )
    with pytest.raises(PipelineError) as caught:
        run_verify(request, {})
    return caught.value


@pytest.mark.parametrize("by_name", [False, True], ids=["folder", "reference"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
@pytest.mark.parametrize("name", FILES)
def test_changed_package_is_refused_as_corrupt(
    signed: Signed, name: str, change: Change, by_name: bool
) -> None:
    reference = signed.publish()
    assert signed.verify(reference).signer
    package = signed.bench.registry.location(reference)
    change(package, package / name)
    assert _refusal(signed, reference, by_name).exit_code == ExitCode.CORRUPT


def test_no_byte_of_the_manifest_may_change(signed: Signed) -> None:
    reference = signed.publish()
    package = signed.bench.registry.location(reference)
    data = (package / "manifest.json").read_bytes()
    codes = []
    for index in range(len(data)):
        flipped = data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :]
        _rewrite(package / "manifest.json", flipped)
        codes.append(_refusal(signed, reference, by_name=False).exit_code)
    # Untrusted: it is whole, but has become the manifest of another name, variant or version.
    assert set(codes) == {ExitCode.CORRUPT, ExitCode.UNTRUSTED}
    assert codes.count(ExitCode.UNTRUSTED) < 100
    _rewrite(package / "manifest.json", data)
    assert signed.verify(reference).signer


def test_package_that_was_replaced_by_a_whole_one_is_refused(signed: Signed) -> None:
    reference, other = signed.publish(), signed.publish("2.0")
    package = signed.bench.registry.location(reference)
    package.rename(package.parent / "aside")
    signed.bench.registry.location(other).rename(package)
    assert _refusal(signed, reference, by_name=False).exit_code == ExitCode.UNTRUSTED
    assert isinstance(_refusal(signed, reference, by_name=True), CorruptError)
