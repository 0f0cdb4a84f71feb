"""Loads Transformers models and tokenizers from a folder: quietly, offline, without remote code."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Libraries that print to stdout and warn about their own internals write to our debug log."""
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    logging.getLogger("modelopt").setLevel(logging.ERROR)
    captured = StringIO()
    try:
        with contextlib.redirect_stdout(captured), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for line in captured.getvalue().splitlines():
            log.debug("%s", line)


def load_model(folder: Path, dtype: str) -> Any:
    """A causal language model in evaluation mode, on the CPU.

    Args:
        folder: Hugging Face folder with safetensors.
        dtype: Name of a torch dtype, such as `float32`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with quiet():
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    return model.eval()


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer."""
    from transformers import AutoTokenizer

    with quiet():
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
