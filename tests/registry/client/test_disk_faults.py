"""Faults of our disk after the bytes have landed: at fsync, and at the rename that shows them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

import pytest

from pipeline.core.errors import PipelineError
from pipeline.registry.client.layout import verify_layout
from tests.registry.client.conftest import Shop

_CODES = [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE]


def _failing(number: int) -> Callable[..., Any]:
    def fail(path: Any, *args: Any, **kwargs: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("call", ["fsync", "rename", "chmod"])
@pytest.mark.parametrize("number", _CODES, ids=lambda number: errno.errorcode[number])
def test_a_fault_of_our_disk_at_the_end_of_a_pull_is_clean_and_a_rerun_completes(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    reference = shop.publish()
    with monkeypatch.context() as patched:
        patched.setattr(os, call, _failing(number))
        with pytest.raises(PipelineError, match=os.strerror(number)):
            shop.pull()
    assert shop.left() == []
    shop.pull()
    assert verify_layout(shop.to).digest == reference.digest
    assert shop.left() == ["tiny"]
