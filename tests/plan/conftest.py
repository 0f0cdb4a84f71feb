from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from pipeline.core.hardware import Target
from pipeline.core.settings import shipped
from pipeline.core.values import Limits
from pipeline.formats.spec import format_spec
from pipeline.model.spec import ModelSpec
from pipeline.plan.sizes import PlanRequest
from pipeline.quant.spec import quant_spec
from tests.specs import shape

Ask = Callable[..., PlanRequest]


@pytest.fixture(scope="session")
def shape_of() -> Callable[[str], ModelSpec]:
    return functools.cache(shape)


@pytest.fixture(scope="session")
def target_of() -> Callable[[str], Target]:
    def load(name: str) -> Target:
        return Target(**shipped(f"target/{name}"))

    return load


@pytest.fixture(scope="session")
def ask(shape_of: Callable[[str], ModelSpec], target_of: Callable[[str], Target]) -> Ask:
    """A request that plans cleanly: Llama 3.1 for vLLM on an RTX 4090; keywords change it."""

    def request(
        model: str | ModelSpec = "llama3.1",
        target: str = "rtx4090",
        *,
        max_batch_size: int = 8,
        max_seq_len: int = 2048,
        max_num_tokens: int = 4096,
        kv_cache_dtype: str = "fp8",
        **changes: Any,
    ) -> PlanRequest:
        limits = Limits(
            max_batch_size=max_batch_size,
            max_seq_len=max_seq_len,
            max_num_tokens=max_num_tokens,
            kv_cache_dtype=kv_cache_dtype,
        )
        asked: dict[str, Any] = {
            "name": model if isinstance(model, str) else "own",
            "shape": shape_of(model) if isinstance(model, str) else model,
            "target": target_of(target),
            "format": "checkpoint",
            "precision": "fp8",
            "limits": limits,
            "runtime": ("vllm", "0.24.0"),
        }
        asked |= changes
        asked["format"] = format_spec(asked["format"])
        asked["precision"] = quant_spec(asked["precision"])
        return PlanRequest(**asked)

    return request
