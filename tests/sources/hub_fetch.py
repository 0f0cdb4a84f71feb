"""The source of the tiny repository, fetched here or in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from pipeline.sources.hub import HubSource
from tests.sources.hub_server import COMMIT, REPO

SOURCE = HubSource(repo_id=REPO, revision=COMMIT, licence="MIT")
FETCH = (
    "from pipeline.sources.hub import HubSource;"
    f"HubSource(repo_id={REPO!r}, revision={COMMIT!r}, licence='MIT').fetch();"
    "import sys; print('huggingface_hub' in sys.modules)"
)


def partial_files(cache: Path) -> Path:
    return cache / "weights/hub/acme--tiny" / f"{COMMIT}.partial" / "files"


def run_fetch(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", FETCH],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
