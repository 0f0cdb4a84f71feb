from __future__ import annotations

import errno
import io
import os
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.cache import RECORD
from pipeline.core.errors import CorruptError, RecipeError, TransientError
from pipeline.core.values import Engine, Licence
from pipeline.registry.manifest import verify
from pipeline.registry.package import require_manifest_publishable, require_publishable
from tests.registry.packages import make_engine, seal_engine, sealed_package


@pytest.fixture
def package_dir(tmp_path: Path) -> Path:
    return sealed_package(tmp_path / "package").dir


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return make_engine(tmp_path / "engine")


def test_sealed_folder_verifies_with_the_same_digest(tmp_path: Path) -> None:
    sealed = sealed_package(tmp_path / "a")
    assert verify(tmp_path / "a") == sealed
    assert sealed_package(tmp_path / "b").digest == sealed.digest
    assert (sealed.engine_dir / "model.plan").read_bytes() == b"plan" * 100


def test_stage_record_and_empty_folders_stay_behind(engine: Engine, tmp_path: Path) -> None:
    (engine.dir / RECORD).write_text('{"seconds": 1.5}')
    (engine.dir / "empty").mkdir()
    package = seal_engine(tmp_path / "p", engine)
    assert [file["path"] for file in package.manifest["files"]] == [
        "engine/model.plan",
        "engine/tokenizer/tokenizer.json",
    ]
    assert verify(tmp_path / "p") == package


@pytest.mark.parametrize("kind", ["symlink", "fifo", "colon", "device", "empty"])
def test_engine_that_no_package_may_hold_is_refused(
    engine: Engine, tmp_path: Path, kind: str
) -> None:
    names = {"colon": "a:b", "device": "CON"}
    if kind == "symlink":
        (engine.dir / "x").symlink_to("/etc/hostname")
    elif kind == "fifo":
        os.mkfifo(engine.dir / "x")
    elif kind == "empty":
        shutil.rmtree(engine.dir)
        engine.dir.mkdir()
    else:
        (engine.dir / names[kind]).write_text("")
    with pytest.raises(CorruptError):
        seal_engine(tmp_path / "p", engine)
    assert not (tmp_path / "p" / "manifest.json").exists()


def test_full_disk_while_copying_is_transient(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open = io.open

    def full(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "x" in mode:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real_open(path, mode, *args, **kwargs)

    monkeypatch.setattr(io, "open", full)
    with pytest.raises(TransientError, match="free some space"):
        seal_engine(tmp_path / "p", engine)


@pytest.mark.parametrize("name", ["", "NOTICE", "Notice"])
def test_a_notice_travels_in_the_package_and_joins_the_one_that_the_weights_have(
    engine: Engine, tmp_path: Path, name: str
) -> None:
    licence = Licence(spdx="MIT", redistribution="with-notice", notice="Built with Llama")
    if name:
        (engine.dir / name).write_text("by acme\n")
    package = seal_engine(tmp_path / "p", engine, licence=licence)
    before = "by acme\n\n" if name else ""
    assert (package.engine_dir / "NOTICE").read_text() == f"{before}Built with Llama\n"
    assert package.manifest["licence"]["notice"] == "Built with Llama"
    assert verify(package.dir) == package


GATED = Licence(
    spdx="LicenseRef-Llama", gated=True, redistribution="with-notice", read_at="the Hub"
)
OPEN = Licence(spdx="MIT", redistribution="allowed")


@pytest.mark.parametrize(
    ("licence", "private", "public"),
    [
        (OPEN, [], []),
        (Licence(spdx="MIT"), [], ["registry"]),
        (GATED, ["source.acknowledge_licence"], ["source.acknowledge_licence"]),
        (replace(GATED, acknowledged="MIT"), *[["source.acknowledge_licence"]] * 2),
        (replace(GATED, acknowledged=GATED.spdx), [], []),
    ],
)
def test_weights_are_published_where_their_licence_allows(
    licence: Licence, private: list[str], public: list[str]
) -> None:
    for everybody, paths in ((False, private), (True, public)):
        with pytest.raises(RecipeError) if paths else nullcontext() as caught:
            require_publishable(licence, public=everybody)
        if caught is not None:
            assert [fault.path for fault in caught.value.faults] == paths
            assert licence.spdx in str(caught.value)


@pytest.mark.parametrize(
    ("random", "redistribution", "public", "throwaway", "allowed"),
    [
        (False, "allowed", True, False, True),
        (False, "forbidden", False, False, True),
        (False, "forbidden", True, False, False),
        (True, "allowed", False, False, False),
        (True, "forbidden", False, True, True),
    ],
)
def test_a_sealed_package_goes_where_its_manifest_allows(
    random: bool, redistribution: str, public: bool, throwaway: bool, allowed: bool
) -> None:
    manifest: dict[str, Any] = {
        "source": {"random": random},
        "licence": {"spdx": "MIT", "redistribution": redistribution},
    }
    with nullcontext() if allowed else pytest.raises(RecipeError, match="registry"):
        require_manifest_publishable(manifest, public=public, throwaway=throwaway)
