"""Close matches for misspelt names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_CUTOFF = 0.6  # difflib's own default; it finds `smolm2` and not `phi3` for `smollm2`
_SHOWN = 12


def closest(name: str, options: Iterable[str]) -> str | None:
    """The option most like `name`, upper and lower case alike; None if none is similar."""
    by_lower = {option.lower(): option for option in options}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=_CUTOFF)
    return by_lower[found[0]] if found else None


def suggestion(name: str, options: Iterable[str]) -> str:
    """What to write instead of `name`: `did you mean a? allowed: a, b, c`."""
    allowed = sorted(set(options))
    if not allowed:
        return "nothing is allowed here"
    match = closest(name, allowed)
    listed = ", ".join(allowed[:_SHOWN])
    if len(allowed) > _SHOWN:
        listed += f" and {len(allowed) - _SHOWN} more"
    return (f"did you mean {match}? " if match else "") + f"allowed: {listed}"
