"""SIGKILL at each step that changes the disk, and several publishers at once."""

from __future__ import annotations

import fcntl
import io
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import ConflictError, TransientError
from pipeline.core.values import Reference
from pipeline.registry.lifecycle.channels import read_channels, read_log
from pipeline.registry.package import verify
from pipeline.registry.reference import reference_of
from pipeline.registry.signing.signer import build_statements, sign_report
from tests.registry.signing.conftest import RUN

Bench = Any
InChildren = Callable[[Sequence[Callable[[], object]]], list[int]]

_KEY = "b" * 64
_VARIANT = "sm89-trtrtx-fp8-b8"


def _build(bench: Bench) -> Reference:
    """What a build does with the registry, from the look-up to the channel."""
    registry = bench.registry
    found = next(registry.find("tiny", _VARIANT, _KEY), None)
    if found is None:
        with registry.staging() as staging:
            package = bench.seal(staging)
            signed = build_statements(package, bench.key, RUN)
            reference: Reference = registry.publish(package, signed)
    else:
        reference = reference_of(found)
    if not (registry.statements_dir(reference) / "test-1").exists():
        report = bench.report(reference)
        files = {"report.json": report, **sign_report(report, bench.key)}
        registry.add_statement(reference, "test-1", files)
    bench.enter(reference)
    return reference


def _kill_at_step(number: int) -> None:
    """From now on, SIGKILL this process at its `number`-th step.

    Before each call that changes the disk is a step; after a file was opened for writing, too:
    then it is there, but empty.
    """
    left = number

    def step() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def changing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            step()
            return real(*args, **kwargs)

        return call

    for name in ("mkdir", "fsync", "chmod", "rename", "replace", "unlink", "rmdir"):
        setattr(os, name, changing(getattr(os, name)))

    real_open = io.open

    def open_file(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        writes = bool(set(mode) & set("wxa"))
        if writes:
            step()
        stream = real_open(path, mode, *args, **kwargs)
        if writes:
            step()
        return stream

    io.open = open_file  # type: ignore[assignment]


@pytest.mark.slow
def test_sigkill_at_any_step_leaves_nothing_half_visible(
    bench: Bench, in_children: InChildren
) -> None:
    registry = bench.registry
    bench.engine()  # made before the clock starts
    steps = 0
    visible_after: list[tuple[bool, bool, bool]] = []
    while True:
        steps += 1

        def job(number: int = steps) -> None:
            _kill_at_step(number)
            _build(bench)

        (code,) = in_children([job])
        if code == 0:
            break
        assert code == -signal.SIGKILL
        entries = registry.entries()
        visible = len(entries), sum(s.name == "test-1" for e in entries for s in e.statements)
        if entries:
            (entry,) = entries
            assert entry.fault == ""
            assert verify(Path(entry.where)).digest == entry.digest
            names = [statement.name for statement in entry.statements]
            assert any(name.startswith("build-") for name in names)  # never seen without it
            assert all(one.passed for one in entry.statements if one.name == "test-1")
        channels = read_channels(registry.store, bench.policy, "tiny", _VARIANT)
        assert all(move.reference == entries[0].reference for move in channels)
        visible_after.append((bool(visible[0]), bool(visible[1]), bool(channels)))

        reference = _build(bench)
        assert bench.resolve("tiny:candidate").digest == reference.digest
        with registry.staging():  # whoever writes next clears what the dead left
            pass
        assert list((registry.path / ".staging").iterdir()) == []
        shutil.rmtree(registry.path)
    # The kills hit all phases: before anything shows, after each thing shows.
    assert visible_after == sorted(visible_after)
    assert set(visible_after) == {
        (False, False, False),
        (True, False, False),
        (True, True, False),
        (True, True, True),
    }
    assert steps > 25


def test_of_two_publishers_of_other_bytes_one_wins(bench: Bench, in_children: InChildren) -> None:
    engines = [bench.engine(plan=bytes([number]) * 100) for number in range(4)]
    codes = in_children([partial(bench.publish, engine) for engine in engines])
    assert sorted(codes) == [0, ConflictError.exit_code, 8, 8]
    (entry,) = bench.registry.entries()
    plan = (verify(Path(entry.where)).engine_dir / "model.plan").read_bytes()
    assert plan == bytes([codes.index(0)]) * 100
    assert list((bench.registry.path / ".staging").iterdir()) == []


def test_publishers_of_the_same_bytes_all_succeed(bench: Bench, in_children: InChildren) -> None:
    engine = bench.engine()
    assert in_children([partial(bench.publish, engine)] * 4) == [0, 0, 0, 0]
    (entry,) = bench.registry.entries()
    assert verify(Path(entry.where))


@pytest.mark.parametrize("locks", ["work", "are granted to everybody"])
def test_concurrent_moves_of_a_channel_lose_none(
    bench: Bench, in_children: InChildren, monkeypatch: pytest.MonkeyPatch, locks: str
) -> None:
    """Some network file systems accept a lock and ignore it."""
    if locks != "work":
        monkeypatch.setattr(fcntl, "flock", lambda *args: None)
    references = [bench.publish(label=bench.label(f"{number}.0")) for number in range(4)]
    for reference in references:
        bench.approve(reference)

    def move(reference: Reference) -> None:
        while True:
            try:
                assert bench.enter(reference).move.reference == reference
            except (ConflictError, TransientError):  # somebody else was first: look again
                continue
            return

    assert in_children([partial(move, reference) for reference in references]) == [0] * 4
    log = read_log(bench.registry.store, bench.policy, "tiny", _VARIANT, "candidate", bench.card)
    assert {one.reference for one in log.moves} == set(references)
    assert [one.seq for one in log.moves] == list(range(1, len(log.moves) + 1))
    assert bench.resolve("tiny:candidate").digest == log.moves[-1].reference.digest
