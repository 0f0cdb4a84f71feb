"""The YAML files of a new recipe, as a person would write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.model.read import IRRELEVANT
from pipeline.model.spec import ModelSpec
from pipeline.runners.workload import Workload


def recipe_text(
    *,
    name: str,
    option: str,
    source: Mapping[str, Any],
    target: str,
    compiler: str,
    targets: Sequence[Workload],
    window_tokens: int | None,
) -> str:
    """`NAME.yaml`.

    Args:
        name: The recipe.
        option: Option of the group `source`.
        source: Its keys.
        target: Option of the group `target`.
        compiler: Option of the group `compiler`.
        targets: Workloads that the card must reach.
        window_tokens: For a model whose context is shorter than acceptance's own; else None.
    """
    command = f"enginesmith build {name}"
    if source.get("gated"):
        command += f" source.acknowledge_licence={source['licence']}  (once you have read it)"
    defaults = [
        "build",
        {"shapes@shape": name},
        {f"optional sizes/{name}@compiler": "${compiler}"},
        {"override source": option},
        {"override target": target},
        {"override compiler": compiler},
        "_self_",
    ]
    keys = ("name", "batch", "isl", "osl", "min_share_of_ceiling")
    acceptance = {
        **({} if window_tokens is None else {"window_tokens": window_tokens}),
        "targets": [{key: getattr(load, key) for key in keys} for load in targets],
    }
    # Hydra must take nothing in the values for an interpolation.
    escaped = {
        key: value.replace("${", "\\${") if isinstance(value, str) else value
        for key, value in source.items()
    }
    head = {"name": name, "version": "1.0.0", "source": escaped}
    return "".join(
        [
            f"# {command}\n",
            _yaml({"defaults": defaults}, flow=False) + "\n",
            _yaml(head, flow=False),
            _yaml({"acceptance": acceptance}),
        ]
    )


def shape_text(shape: ModelSpec, described: str) -> str:
    """`shapes/NAME.yaml`: the keys of config.json that say what the model is."""
    kept = {key: value for key, value in shape.config.items() if key not in IRRELEVANT}
    return f"# {described}.\n" + _yaml(kept)


def sizes_text(settings: Mapping[str, Any], target: str, most: int) -> str:
    """`sizes/NAME/COMPILER.yaml`."""
    found = f"# The largest batch up to {most} that `enginesmith plan` accepts for {target} here.\n"
    return found + _yaml(settings)


def _yaml(value: Mapping[str, Any], *, flow: bool | None = None) -> str:
    """A mapping as YAML; lists and mappings without others in them on one line each."""
    import yaml

    text: str = yaml.safe_dump(
        dict(value),
        default_flow_style=flow,
        sort_keys=False,
        width=100 if flow is None else 10_000,  # a notice is one line
        allow_unicode=True,
    )
    return text
