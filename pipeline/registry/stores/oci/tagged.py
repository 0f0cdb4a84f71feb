"""Change what a tag names, though no registry compares before it sets.

The distribution API has no conditional write: docker-registry 2.8 ignores `If-None-Match` on a tag
(tried 2026-11-25). So a document that several may change is read, changed, written under its tag,
and read back some time later: whoever finds his own change gone makes it again, on top of what is
there then. A change is lost for good only if another writer needed more than SETTLE_S between his
read and his write; signatures and sequence numbers inside the documents tell even then.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from pipeline.core.errors import TransientError
from pipeline.registry.stores.oci.distribution import Repository
from pipeline.registry.stores.oci.documents import Document

SETTLE_S = 0.5
"""Many times what a read and a write of a few kilobytes take on one network."""
_ROUNDS = 30


def change_tagged(
    repository: Repository,
    tag: str,
    change: Callable[[Document | None], Document | None],
) -> None:
    """Change the document under a tag until the change stays.

    Args:
        repository: Where.
        tag: Its name.
        change: What is there -> what shall be there; None once the change is there.

    Raises:
        TransientError: Others overwrote it every time.
    """
    for _ in range(_ROUNDS):
        after = change(repository.manifest(tag))
        if after is None:
            return
        repository.put_manifest(tag, after)
        settle()
    if change(repository.manifest(tag)) is not None:
        raise TransientError(f"others keep writing {repository}:{tag}; run the same command again")


def settle() -> None:
    """Wait for what others began before our write; the times differ, so that nobody keeps step."""
    time.sleep(SETTLE_S * random.uniform(1.0, 1.5))
