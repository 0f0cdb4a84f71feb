"""`make record-stages`: write versions and code digests of all stages into `stages.yaml`."""

from __future__ import annotations

import importlib
import re

from pipeline.core.cache import RECORD_FILE, Stage

ROOM = RECORD_FILE.parents[1]
HEADER = (
    "# Stage -> its version, and a digest of its code at that version; `make record-stages` writes "
    "this.\n# On a merge conflict take either side and run it again.\n"
)


def all_stages() -> dict[str, Stage]:
    """Every stage of the pipeline by name, found by its line in the sources."""
    found: dict[str, Stage] = {}
    for path in sorted(ROOM.rglob("*.py")):
        if re.search(r"^\w+ = Stage\(", path.read_text(), re.MULTILINE):
            module = ".".join(path.relative_to(ROOM.parent).with_suffix("").parts)
            for stage in vars(importlib.import_module(module)).values():
                if isinstance(stage, Stage):
                    assert found.setdefault(stage.name, stage) == stage, stage.name
    return dict(sorted(found.items()))


def record_text() -> str:
    """What `stages.yaml` should say."""
    lines = [
        f"{name}: {{version: {stage.version}, code: '{stage.digest}'}}\n"
        for name, stage in all_stages().items()
    ]
    return HEADER + "".join(lines)


if __name__ == "__main__":
    RECORD_FILE.write_text(record_text())
    print(f"recorded {len(all_stages())} stages in {RECORD_FILE}")
