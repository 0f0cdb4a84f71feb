"""One file of a Hub dataset at a commit, for calibration or evaluation text."""

from __future__ import annotations

from pathlib import Path

from pipeline.core.cache import locked
from pipeline.core.errors import NotFoundError
from pipeline.sources import store


def dataset_file(repo_id: str, revision: str, name: str) -> Path:
    """The file in the weight cache, downloaded and verified like a model's unless it is there.

    Args:
        repo_id: Such as `abisee/cnn_dailymail`.
        revision: Full commit.
        name: Path in the repository.

    Raises:
        NotFoundError: No such dataset, commit or file.
        CorruptError: It arrived with other bytes than the Hub lists.
        TransientError: Network, rate limit or full disk.
    """
    slug = repo_id.replace("/", "--")
    folder = store.weights_root() / "hub-datasets" / slug / revision
    target = folder / name
    with (
        store.disk_faults_explained(),
        locked(store.lock_path(f"dataset-{slug}-{revision[:12]}")),
    ):
        # The client gives a file its name only when its digest was right.
        if target.is_file():
            return target
        from pipeline.sources.hub_client import HubClient

        client = HubClient(repo_id, revision, "dataset")
        remote = client.list_files()
        if name not in remote:
            have = ", ".join(sorted(remote))
            raise NotFoundError(f"{repo_id}@{revision[:12]} has no file {name!r}; it has {have}")
        target.parent.mkdir(parents=True, exist_ok=True)
        client.download(remote[name], folder)
    return target
