"""One who holds rights in the store: to add, to rewrite, to delete."""

from __future__ import annotations

from pathlib import Path

from pipeline.registry.stores.publication import WritableStore
from tests.hostile.world import COMMANDS, make_world

HONEST = {
    "pull": [0, 6, 5, 0],
    "verify": [0, 5, 6],
    "generate": [0, 5, 0],
    "promote": [0, 3, 5, 0, 0],
    "yank": [0, 5, 0, 0],
    "list": [0, 0, 0],
    "show": [0, 0, 0, 0],
    "gc": [0, 0, 0],
    "copy": [0, 5],
    "rollback": [5, 7, 0],
    "next": [0, 0, 0],
}


def test_an_honest_registry_gives_what_its_history_says(
    folder_store: WritableStore, tmp_path: Path
) -> None:
    for command in COMMANDS:
        world = make_world(folder_store, tmp_path / command)
        done = world.perform(command)
        assert [one.code for one in done] == HONEST[command], command
        for key in world.raw.dump():
            world.raw.delete(key)
