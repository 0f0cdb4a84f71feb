"""Rotary tables equal those of Transformers, for every kind of scaling and published config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.model.read import read_spec
from pipeline.model.spec import LongRopeScaling, Rope, rope_tables

CONFIGS = sorted((Path(__file__).parent / "configs").glob("*.json"))


def transformers_tables(config_json: dict[str, Any], positions: int) -> list[Any]:
    """Cosine and sine [positions, rotary_dim] of one forward pass over all these positions."""
    import torch
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    fields = dict(config_json)
    model_type = fields.pop("model_type")
    config = AutoConfig.for_model(model_type, **fields)
    kind = Phi3RotaryEmbedding if model_type == "phi3" else LlamaRotaryEmbedding
    return [
        table[0].numpy() for table in kind(config)(torch.zeros(1), torch.arange(positions)[None])
    ]


def assert_equal_tables(rope: Rope, wanted: list[Any], *, rows: slice, context: int) -> None:
    for table, reference in zip(rope_tables(rope, context=context), wanted, strict=True):
        assert table.dtype == np.float64
        assert table.shape == (context, rope.rotary_dim / 2)
        doubled = np.concatenate([table, table], axis=-1)[rows]
        # Transformers multiplies in float32: 8191 rad x 6e-8 is 5e-4.
        np.testing.assert_allclose(doubled, reference[rows], rtol=0, atol=8e-4)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_tables_of_published_configs_equal_transformers(path: Path) -> None:
    config = json.loads(path.read_text())
    rope = read_spec(config).rope
    for context in (4096, 8192):  # Phi-4-mini's original context, and one beyond it
        assert_equal_tables(
            rope,
            transformers_tables(config, context),
            rows=slice(0, context),
            context=context,
        )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_tables_differ_from_those_of_other_settings_by_far(path: Path) -> None:
    """The tolerance above would not forgive another theta, factor, context or attention factor."""
    rope = read_spec(json.loads(path.read_text())).rope
    others = [Rope(theta=rope.theta * 1.1, rotary_dim=rope.rotary_dim, scaling=rope.scaling)]
    if rope.scaling is not None:
        others.append(Rope(theta=rope.theta, rotary_dim=rope.rotary_dim))
    mine = rope_tables(rope, context=8192)[0]
    for other in others:
        assert np.abs(rope_tables(other, context=8192)[0] - mine).max() > 0.05
    if isinstance(rope.scaling, LongRopeScaling):
        assert np.abs(rope_tables(rope, context=4096)[0] - mine[:4096]).max() > 0.05
        assert mine[0, 0] == pytest.approx(rope.scaling.attention_factor)
