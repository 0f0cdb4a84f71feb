"""What `enginesmith pull` does, less the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from pipeline.registry.client.receipt import Pulled


def failure_json(error: BaseException) -> dict[str, Any]:
    """A failure for programs; later versions only add."""
    from pipeline.outcome import failure_of

    outcome = failure_of(error)
    return {"schema": 1, "exit_code": int(outcome.exit_code), "message": outcome.message}


def shown(work: Callable[[], Pulled], *, as_json: bool) -> str:
    """Do it, and what to print: one JSON object, or lines for people.

    Raises:
        BaseException: As it came; with `as_json` its object was printed before.
    """
    try:
        done = work()
    except BaseException as error:
        if as_json:
            print(json.dumps(failure_json(error)), flush=True)
        raise
    return json.dumps(done.to_json()) if as_json else "\n".join(done.lines())
