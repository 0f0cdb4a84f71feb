"""What a licence asks of whoever passes weights on: one data file, and its rules."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from pipeline.core.values import Redistribution


@dataclass(frozen=True, kw_only=True)
class KnownLicence:
    """A row of `licences.yaml`; its fields are explained at the top of that file."""

    hub: str
    licence: str
    redistribution: Redistribution
    notice: str = ""


def check_notice(redistribution: Redistribution, notice: str) -> None:
    """Demand the text that must travel with weights.

    Raises:
        ValueError: The licence asks for a notice, and there is none.
    """
    if redistribution == "with-notice" and not notice.strip():
        raise ValueError(
            "redistribution is with-notice, and there is no notice; set source.notice to the text "
            "that the licence asks for"
        )


def licence_of_hub(tag: str | None) -> KnownLicence:
    """The terms behind the licence tag of a Hub repository.

    Args:
        tag: Such as `apache-2.0`; None where the repository states none.

    Returns:
        The row of the table; for a tag that it does not have, terms that forbid redistribution
        until a person has read them.
    """
    name = tag or "unstated"
    unknown = KnownLicence(hub=name, licence=f"LicenseRef-{name}", redistribution="forbidden")
    return known_licences().get(name, unknown)


@cache
def known_licences() -> dict[str, KnownLicence]:
    """The table that travels with the package, by Hub tag."""
    import yaml

    text = files("pipeline.sources").joinpath("licences.yaml").read_text("utf-8")
    rows: list[dict[str, Any]] = yaml.safe_load(text)
    return {row["hub"]: KnownLicence(**row) for row in rows}
