"""Where a new recipe's weights come from: a Hub commit or a folder. Only config.json is read."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.core.data import read_json_object
from pipeline.core.errors import Fault, NotFoundError, RecipeError
from pipeline.sources.hub import is_repo_id
from pipeline.sources.hub_client import HubClient
from pipeline.sources.weights import CONFIG, check_listing, licence_of_hub


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A model that a recipe can be made from.

    Attributes:
        described: For the comment of its shape file.
        config: Its `config.json`.
        option: Option of the group `source`.
        source: What the recipe's `source` section says.
    """

    described: str
    config: Mapping[str, Any]
    option: Literal["hub", "local"]
    source: Mapping[str, Any]


def read_origin(text: str, revision: str | None) -> Origin:
    """Find the model that `--from` names: a folder, else a Hub repository.

    Args:
        text: The name.
        revision: Commit, branch or tag on the Hub, which is resolved to a commit; None for `main`.

    Raises:
        NotFoundError: No such folder, repository or revision, or no model in it.
        RecipeError: Neither a folder nor a name that the Hub could have; weights that are pickles.
        CorruptError: `config.json` is no JSON object.
        PipelineError: As `HubClient`.
    """
    folder = Path(text).expanduser()
    if folder.is_dir():
        if revision is not None:
            message = f"{text} is a folder, and only a Hub repository has revisions; leave it out"
            raise RecipeError([Fault("--revision", message)])
        return _local(folder.resolve())
    if text.startswith(("/", ".", "~")):
        raise NotFoundError(f"--from: {text} is not a folder; it must hold a model's {CONFIG}")
    if not is_repo_id(text):
        message = f"{text!r} is neither a folder nor <owner>/<name>, as repositories on the Hub are"
        raise RecipeError([Fault("--from", message)])
    return _hub(text, revision or "main")


def _local(folder: Path) -> Origin:
    if not (folder / CONFIG).is_file():
        raise NotFoundError(f"--from: {folder} has no {CONFIG}; it must hold a model")
    config = read_json_object(folder / CONFIG)
    source = {"path": str(folder), "licence": licence_of_hub(None).licence}
    return Origin(described=f"The folder {folder}", config=config, option="local", source=source)


def _hub(repo_id: str, revision: str) -> Origin:
    found = HubClient(repo_id, revision).describe()
    client = HubClient(repo_id, found.commit)
    remote = client.list_files()
    check_listing(remote, f"{repo_id}@{found.commit[:12]}")
    with tempfile.TemporaryDirectory() as folder:
        client.download(remote[CONFIG], Path(folder))
        config = read_json_object(Path(folder) / CONFIG)
    terms = licence_of_hub(found.licence)
    source = {
        "repo_id": repo_id,
        "revision": found.commit,
        "licence": terms.licence,
        "redistribution": terms.redistribution,
        **({"gated": True} if found.gated else {}),
        **({"notice": terms.notice} if terms.notice else {}),
    }
    described = f"{repo_id} on the Hugging Face Hub at commit {found.commit}"
    return Origin(described=described, config=config, option="hub", source=source)
