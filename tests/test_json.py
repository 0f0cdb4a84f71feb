"""`--json` of every command: one object on stdout, with the exit code, whatever happens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline import accept as acceptance
from pipeline import cli
from pipeline.core.hardware import target_of_card
from pipeline.registry.trust.signing import generate_key, write_key_pair
from tests.tiny_recipe import CHECKPOINT, QUICK, Workplace

COMMANDS = sorted(str(command.name) for command in cli.make_app().registered_commands)
OWN = ("--config-dir", "own")
KEYS = tuple(override for override in CHECKPOINT if not override.startswith("compiler="))

DONE: dict[str, tuple[str, ...]] = {
    "accept": ("tiny:candidate", *KEYS, "acceptance.chat=null", *OWN),
    "build": ("tiny", *QUICK, *OWN),
    "config": ("tiny", *OWN),
    "channels": (),
    "copy": ("tiny:candidate", "--from", "artifacts", "--to", "there"),
    "export-trtllm": ("checkpoint", "exported"),
    "gc": (),
    "generate": ("tiny:candidate", "Hello", "--max-tokens", "2"),
    "keygen": ("--out", "new.key"),
    "list": (),
    "new": ("fresh", "--from", "model", *OWN),
    "plan": ("tiny", *CHECKPOINT, *OWN),
    "promote": ("tiny:candidate", "--channel", "candidate"),
    "policy": ("taken.key.pub",),
    "pull": ("tiny:candidate", "--to", "pulled", "--gpu", "none", "--accept-unproven"),
    "rehearse": ("tiny", *CHECKPOINT[:2], "compiler=trtllm", *OWN),
    "rollback": ("tiny", "--channel", "candidate"),
    "show": ("tiny:candidate",),
    "sign": ("tiny:candidate", "--key", "taken.key"),
    "verify": ("tiny:candidate",),
    "yank": ("tiny:candidate", "--reason", "crashes"),
}
"""Of each command a call that succeeds here; a race does in tests/acceptance/race."""

REFUSED: dict[str, tuple[int, tuple[str, ...]]] = {
    "accept": (7, ("nosuch",)),
    "build": (2, ("nosuch", "x=1,2")),
    "config": (2, ("nosuch", "x=1,2")),
    "channels": (7, ("nosuch",)),
    "copy": (7, ("nosuch", "--from", "artifacts", "--to", "there")),
    "export-trtllm": (7, ("nowhere", "exported")),
    "gc": (2, ("--policy", "nosuch.yaml")),
    "generate": (7, ("nosuch", "Hello")),
    "keygen": (8, ("--out", "taken.key")),
    "list": (2, ("--registry", "ftp://host/engines")),
    "new": (8, ("tiny", "--from", "model", *OWN)),
    "plan": (2, ("tiny", *CHECKPOINT, "compiler.max_seq_len=1000000", *OWN)),
    "promote": (7, ("nosuch",)),
    "policy": (8, ("taken.key.pub", "--out", "taken.key")),
    "pull": (7, ("nosuch", "--to", "pulled", "--gpu", "none")),
    "race": (2, ("nosuch",)),
    "rehearse": (2, ("nosuch",)),
    "rollback": (7, ("nosuch",)),
    "show": (7, ("nosuch",)),
    "sign": (7, ("nosuch", "--key", "taken.key")),
    "verify": (7, ("nosuch",)),
    "yank": (2, ("tiny:candidate",)),
}
"""Of each command a call that fails by itself, with its exit code."""


@pytest.fixture(scope="module")
def twice(built_checkpoint: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A place with two packages that were in `candidate`, one after the other."""
    place = built_checkpoint.copy(tmp_path_factory.mktemp("twice") / "place")
    done = place.build(*QUICK, "version=2.0.0")
    assert done.returncode == 0, done.stderr
    return place


@pytest.fixture
def place(twice: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    """A copy of it, where this process works; with a card as far as `accept` can see."""
    place = twice.copy(tmp_path / "place")
    (place.root / "checkpoint").symlink_to(place.packages()[0] / "engine")
    write_key_pair(generate_key(), place.root / "taken.key")
    for name in set(os.environ) - set(place.env):
        monkeypatch.delenv(name)
    for name, value in place.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(place.root)
    monkeypatch.setattr(acceptance, "this_card", lambda: target_of_card("NVIDIA-L4"))
    return place


class Terminal:
    """Runs commands in this process, and reads what they leave on its standard streams."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capfd = capfd

    def ask(self, *arguments: str) -> tuple[int, dict[str, Any], str]:
        """Exit code, the one object on stdout, and stderr of `enginesmith ARGUMENTS --json`."""
        self._monkeypatch.setattr(sys, "argv", ["enginesmith", *arguments, "--json"])
        self._capfd.readouterr()
        code = cli.main()
        out, err = self._capfd.readouterr()
        assert out.count("\n") == 1, f"not one line: {out}\n{err}"
        return int(code), json.loads(out), err


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(monkeypatch, capfd)


def check_refusal(value: dict[str, Any], code: int, err: str) -> None:
    assert list(value)[:4] == ["schema", "exit_code", "message", "faults"]
    assert (value["schema"], value["exit_code"]) == (1, code)
    assert isinstance(value["message"], str)
    assert value["message"].splitlines()[0] in err  # for who reads along
    assert all(set(fault) == {"path", "message", "where"} for fault in value["faults"])
    assert bool(value["faults"]) is (code == 2)


def test_every_command_has_a_call_here() -> None:
    assert sorted([*DONE, "race"]) == COMMANDS
    assert sorted(REFUSED) == COMMANDS


@pytest.mark.parametrize("name", sorted(DONE))
def test_success_is_one_object(name: str, place: Workplace, terminal: Terminal) -> None:
    code, value, err = terminal.ask(name, *DONE[name])
    assert code == 0, err
    assert list(value)[:2] == ["schema", "exit_code"]
    assert (value["schema"], value["exit_code"]) == (1, 0)
    assert len(value) > 2  # it found something


@pytest.mark.parametrize("name", COMMANDS)
def test_refusal_is_the_same_object(name: str, place: Workplace, terminal: Terminal) -> None:
    wanted, arguments = REFUSED[name]
    code, value, err = terminal.ask(name, *arguments)
    assert code == wanted, err
    check_refusal(value, wanted, err)


@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_usage_is_the_same_object(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: Terminal
) -> None:
    monkeypatch.chdir(tmp_path)
    code, value, err = terminal.ask(name, "--nonsense")
    assert code == 2
    check_refusal(value, 2, err)
    assert "--nonsense" in value["message"]


def test_what_else_is_printed_goes_to_stderr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: Terminal
) -> None:
    def chatter(*arguments: object) -> list[Any]:
        print("a library's banner")
        os.write(1, b"native code\n")
        subprocess.run([sys.executable, "-c", "print('another program')"], check=True)
        return []

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipeline.registry.inventory.entries", chatter)
    code, value, err = terminal.ask("list")
    assert (code, value["packages"]) == (0, [])
    assert all(said in err for said in ("a library's banner", "native code", "another program"))


@pytest.mark.parametrize(("error", "wanted"), [(KeyboardInterrupt(), 130), (KeyError("x"), 1)])
def test_what_ends_a_command_is_told_to_programs(
    error: BaseException,
    wanted: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    terminal: Terminal,
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipeline.registry.inventory.entries", fail)
    code, value, _ = terminal.ask("list")
    assert (code, value["exit_code"]) == (wanted, wanted)
    assert value["message"]
