"""Where the channels of a variant point, for those who look packages up: the signed log alone.

The unsigned file `<channel>.<card>.json` beside the log counts for nothing, there or not: whoever
may write there could change it.
"""

from __future__ import annotations

import logging

from pipeline.registry.lifecycle.channels import read_logs
from pipeline.registry.signing.trust import TrustPolicy
from pipeline.registry.statements import Pointer
from pipeline.registry.stores.store import Store

log = logging.getLogger(__name__)


def pointers(
    store: Store, policy: TrustPolicy, name: str, variant: str, asked: str | None = None
) -> list[Pointer]:
    """Where channels point, by channel and card.

    A channel that was never moved by a signed move is named in a warning and left out.

    Args:
        store: Where they lie.
        policy: Whose moves count.
        name: Recipe.
        variant: Of it.
        asked: The channel that the caller is about to follow; None if it only shows them, so that a
            log which cannot be believed is left out with a warning.

    Raises:
        UntrustedError: The log of the channel that was asked for cannot be believed.
    """
    found: list[Pointer] = []
    logged: set[str] = set()
    for held in read_logs(store, policy, name, variant):
        logged.add(f"{held.channel}.{held.card}.json")
        if held.fault is not None:
            if held.channel == asked:
                raise held.fault
            log.warning("%s of %s is left out: %s", held.channel, held.card, held.fault)
            continue
        move = held.moves[-1]
        found.append(
            Pointer(channel=move.channel, card=move.card, reference=move.reference, seq=move.seq)
        )
    if asked is None or all(pointer.channel != asked for pointer in found):
        _warn_of_unsigned(store, name, variant, logged)
    return found


def _warn_of_unsigned(store: Store, name: str, variant: str, logged: set[str]) -> None:
    for file in sorted(set(store.channels(name, variant)) - logged):
        channel, _, card = file.removesuffix(".json").partition(".")
        log.warning(
            "%s/%s: %s of %s points somewhere, and no signed move says so; it counts for nothing. "
            "Run the build again, or enginesmith promote --channel %s --card %s",
            *(name, variant, channel, card, channel, card),
        )
