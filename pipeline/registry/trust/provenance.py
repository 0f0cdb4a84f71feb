"""SLSA provenance v1 of a package (slsa.dev/spec/v1.0/provenance): from what, by whom, and how."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from pipeline import __version__

BUILD_TYPE = "https://enginesmith.dev/build/v1"
"""Names the meaning of `externalParameters`: the recipe's name and its resolved configuration. An
identifier, not a page."""
LOCAL_BUILDER = "https://enginesmith.dev/builder/local/v1"
"""SLSA builder id of a build that a person started on a machine of theirs; the key tells which. An
identifier, not a page."""
_TIME = "%Y-%m-%dT%H:%M:%SZ"
"""In-toto's Timestamp: RFC 3339 in UTC, whole seconds."""


def provenance_predicate(
    manifest: Mapping[str, Any],
    *,
    builder_id: str,
    invocation_id: str,
    started: datetime,
    finished: datetime,
) -> dict[str, Any]:
    """The predicate of a package's provenance.

    `builder_id` is the URI of what ran the build, such as a CI workflow, which policies may name;
    `invocation_id` names the run in its logs. Both times have a zone.
    """
    source = manifest["source"]
    weights: dict[str, Any] = {
        "name": "weights",
        "uri": source["origin"],
        # Identity of all files of the weights, not of one: no digest in the sense of in-toto.
        "annotations": {"enginesmith_files_digest": source["digest"]},
    }
    if source["commit"]:
        weights["digest"] = {"gitCommit": source["commit"]}
    return {
        "buildDefinition": {
            "buildType": BUILD_TYPE,
            "externalParameters": {
                "recipe": manifest["name"],
                "config": dict(manifest["build"]["config"]),
            },
            "internalParameters": {
                "build_key": manifest["build_key"],
                "tools": dict(manifest["build"]["tools"]),
            },
            "resolvedDependencies": [weights],
        },
        "runDetails": {
            "builder": {"id": builder_id, "version": {"enginesmith": __version__}},
            "metadata": {
                "invocationId": invocation_id,
                "startedOn": started.astimezone(UTC).strftime(_TIME),
                "finishedOn": finished.astimezone(UTC).strftime(_TIME),
            },
        },
    }


def builder_of(predicate: Mapping[str, Any]) -> str:
    """The builder that provenance names; empty if it names none."""
    try:
        return str(predicate["runDetails"]["builder"]["id"])
    except (KeyError, TypeError):
        return ""


def builder(environ: Mapping[str, str], run: str) -> tuple[str, str]:
    """Builder and invocation id of a build; pure.

    In GitHub Actions both come from its default environment variables: the workflow file at its
    ref, and the attempt of the run.

    Args:
        environ: The environment.
        run: Names the run in this machine's records.
    """
    server, repository = environ.get("GITHUB_SERVER_URL"), environ.get("GITHUB_REPOSITORY")
    workflow, run_id = environ.get("GITHUB_WORKFLOW_REF"), environ.get("GITHUB_RUN_ID")
    if environ.get("GITHUB_ACTIONS") == "true" and server and repository and workflow and run_id:
        attempt = environ.get("GITHUB_RUN_ATTEMPT", "1")
        invocation = f"{server}/{repository}/actions/runs/{run_id}/attempts/{attempt}"
        return f"{server}/{workflow}", invocation
    return LOCAL_BUILDER, run
