"""Overrides in Hydra's grammar, and the jobs that they stand for.

    smollm2,phi3  compiler.max_batch_size=1,8  -m      four jobs

Sweeps are comma lists, `choice(...)`, `range(...)` and, for groups, `glob(...)`. Hydra's own
sweeper is not used: it stops at the first fault, and drops what the jobs return.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from pipeline.config.folders import ConfigFolders
from pipeline.core.errors import Fault

if TYPE_CHECKING:
    from hydra.core.config_loader import ConfigLoader


@dataclass(frozen=True, kw_only=True)
class Combination:
    """What one job is made of.

    Attributes:
        recipe: Name of the recipe; it may not exist.
        overrides: One per key, no sweeps.
        swept: Those of them in which this job differs from its neighbours.
    """

    recipe: str
    overrides: tuple[Override, ...]
    swept: tuple[str, ...] = ()


@dataclass(frozen=True)
class _GroupOptions:
    """The part of Hydra's ConfigLoader that `glob()` needs, over our folders."""

    folders: ConfigFolders

    def get_group_options(self, group_name: str, results_filter: Any = None) -> list[str]:
        return list(self.folders.options(group_name))


def combinations(
    recipes: str, overrides: Sequence[str], *, multirun: bool, folders: ConfigFolders
) -> tuple[list[Combination], list[Fault]]:
    """Every combination of the recipes and of the values that the overrides name.

    Args:
        recipes: One name, or several with commas between.
        overrides: As typed. For a key given twice the last one counts.
        multirun: Several recipes and sweeps are allowed.
        folders: Whose options `glob()` chooses from.

    Returns:
        At least one combination, made of what could be read, and the faults of what could not.
    """
    parser = OverridesParser.create(config_loader=cast("ConfigLoader", _GroupOptions(folders)))
    faults: list[Fault] = []
    choices: dict[str, list[Override]] = {}
    for text in overrides:
        values, fault = _values(parser, text)
        if fault is None and len(values) > 1 and not multirun:
            fault = Fault(
                values[0].key_or_group,
                f"{text!r} names several values; add -m to build each, "
                "or write [a,b] for a list and 'a,b' in quotes for text",
            )
        if fault is not None:
            faults.append(fault)
        else:
            choices[values[0].key_or_group] = values
    names = [name.strip().removesuffix(".yaml") for name in recipes.split(",") if name.strip()]
    if not names:
        known = ", ".join(folders.recipe_names())
        faults.append(Fault("", f"no recipe was named; there are: {known}"))
    if len(names) > 1 and not multirun:
        faults.append(Fault("", f"{recipes!r} names several recipes; add -m to build each"))
    jobs = [
        Combination(
            recipe=name,
            overrides=chosen,
            swept=tuple(
                str(override.input_line)
                for override, values in zip(chosen, choices.values(), strict=True)
                if len(values) > 1
            ),
        )
        for name in dict.fromkeys(names)
        for chosen in itertools.product(*choices.values())
    ]
    return jobs, faults


def _values(parser: OverridesParser, text: str) -> tuple[list[Override], Fault | None]:
    """The overrides that one text stands for: itself, or one per value of its sweep."""
    unreadable = Fault(
        "",
        f"cannot read the override {text!r}; write key=value, key=[a,b] for a list, "
        "or 'key=\"any text\"' in quotes",
    )
    try:
        (override,) = parser.parse_overrides([text])
        if not override.key_or_group:
            return [], unreadable
        if not override.is_sweep_override():
            return [override], None
        key = override.get_key_element()
        if not override.is_discrete_sweep():
            return [], Fault(key, f"{text!r} has no list of values; name them: {key}=a,b")
        values = [
            parser.parse_override(f"{key}={value}") for value in override.sweep_string_iterator()
        ]
    except HydraException:
        return [], unreadable
    return values, None if values else Fault(key, f"{text!r} matches no option")
