"""The one exception of the network check."""

from __future__ import annotations

from pipeline.core.errors import PipelineError


class CheckError(PipelineError):
    """What TensorRT-RTX's parser made of the graph is not, or may not be, what the graph says.

    Also raised for anything that this check cannot judge: it fails closed.
    """
