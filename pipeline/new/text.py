"""The YAML files of a new recipe, as a person would write them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.model.config_keys import IRRELEVANT
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
    lines = [
        f"# {command}",
        "defaults:",
        "  - build",
        f"  - shapes@shape: {_scalar(name)}",
        f"  - optional sizes/{name}@compiler: ${{compiler}}",
        f"  - override source: {option}",
        f"  - override target: {_scalar(target)}",
        f"  - override compiler: {compiler}",
        "  - _self_",
        "",
        f"name: {_scalar(name)}",
        "version: 1.0.0",
        "source:",
        *(f"  {key}: {_scalar(value)}" for key, value in source.items()),
        "acceptance:",
    ]
    if window_tokens is not None:
        lines.append(f"  window_tokens: {window_tokens}")
    lines.append("  targets:")
    for load in targets:
        keys = {
            "name": load.name,
            "batch": load.batch,
            "isl": load.isl,
            "osl": load.osl,
            "min_share_of_ceiling": load.min_share_of_ceiling,
        }
        listed = ", ".join(f"{key}: {_scalar(value)}" for key, value in keys.items())
        lines.append(f"    - {{{listed}}}")
    return "\n".join(lines) + "\n"


def shape_text(shape: ModelSpec, described: str) -> str:
    """`shapes/NAME.yaml`: the keys of config.json that say what the model is."""
    import yaml

    kept = {key: value for key, value in shape.config.items() if key not in IRRELEVANT}
    return f"# {described}.\n" + yaml.safe_dump(kept, default_flow_style=None, width=100)


def sizes_text(settings: Mapping[str, Any], target: str, most: int) -> str:
    """`sizes/NAME/COMPILER.yaml`."""
    lines = [f"# The largest batch up to {most} that `enginesmith plan` accepts for {target} here."]
    lines += [f"{key}: {_scalar(value)}" for key, value in settings.items()]
    return "\n".join(lines) + "\n"


def _scalar(value: Any) -> str:
    """A value on one line of YAML; Hydra takes nothing in it for an interpolation."""
    import yaml

    if isinstance(value, str):
        value = value.replace("${", "\\${")
        if "\n" in value:
            return json.dumps(value, ensure_ascii=False)  # YAML, too, and on one line
    text: str = yaml.safe_dump(
        value, default_flow_style=True, width=float("inf"), allow_unicode=True
    )
    return text.removesuffix("...\n").strip()
