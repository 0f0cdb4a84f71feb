"""A TensorRT-RTX engine with this machine's memory in place of a card's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from tensorrt_rtx import HostDevice

from pipeline.runners.decode import DecoderSession
from pipeline.runners.tensorrt_rtx import open_plan


@contextlib.contextmanager
def open_on_host(**arguments: Any) -> Iterator[DecoderSession]:
    """As `open_plan`."""
    with open_plan(**arguments, open_device=HostDevice) as session:
        yield session
