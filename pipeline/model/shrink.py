"""A recipe made small: the same architecture, fusions and ratios, in sizes that take seconds."""

from __future__ import annotations

import dataclasses
from typing import Any

from pipeline.acceptance.chat_probe import ChatSettings
from pipeline.acceptance.sustained_run import SustainedRun
from pipeline.model.shapes import ModelShape
from pipeline.plan.linears import linear_modules, select

CONTEXT = 128
"""Longest request of the small engine, tokens; beyond its model's window, if that has one."""
LAYERS = 5
"""Enough that a recipe which keeps its first four layers in 16 bits still has FP8 ones."""
_MIN_HEADS = 4
_MIN_HEAD_DIM = 16
"""TensorRT-RTX 1.7.1 has no attention kernel for fewer query heads or smaller heads."""
_VOCAB = 512
_MAX_POSITION = 256


def small_shape(shape: ModelShape) -> ModelShape:
    """The shape with fewer layers and smaller sizes.

    Kept: architecture, ties, biases, rope kind and theta, the ratio of query to key heads, and
    whether the heads together are as wide as the residual stream. A sliding window stays shorter
    than the small engine's context, so that it matters.
    """
    ratio = shape.num_attention_heads // shape.num_key_value_heads
    key_value_heads = -(-_MIN_HEADS // ratio)
    heads = ratio * key_value_heads
    head_dim = max(_MIN_HEAD_DIM, shape.head_dim // 4)
    square = shape.hidden_size == shape.num_attention_heads * shape.head_dim
    hidden = heads * head_dim if square else 2 * heads * head_dim
    original = shape.original_max_position_embeddings
    return dataclasses.replace(
        shape,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=min(LAYERS, shape.num_hidden_layers),
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=head_dim,
        vocab_size=_VOCAB,
        max_position_embeddings=_MAX_POSITION,
        original_max_position_embeddings=None if original is None else _MAX_POSITION // 4,
        sliding_window=None if shape.sliding_window is None else CONTEXT // 4,
    )


def small_settings(settings: Any) -> Any:
    """A compiler's settings with small sizes; every other choice stays as the recipe made it."""
    sizes = {
        "max_batch_size": 2,
        "opt_batch_size": 1,
        "max_prefill_batch_size": 1,
        "max_seq_len": CONTEXT,
        "max_num_tokens": CONTEXT,
    }
    names = {field.name for field in dataclasses.fields(settings)}
    return dataclasses.replace(settings, **{k: v for k, v in sizes.items() if k in names})


def small_quantizer(quantizer: Any, shape: ModelShape, text: Any) -> Any:
    """The quantizer with little text, without patterns for layers that the small model lacks."""
    modules = linear_modules(shape)
    return dataclasses.replace(
        quantizer,
        calibration=dataclasses.replace(
            quantizer.calibration, text=text, calib_size=2, seq_len=CONTEXT, batch_size=2
        ),
        keep_16bit=tuple(p for p in quantizer.keep_16bit if select([p], modules)),
    )


def small_acceptance(acceptance: Any, text: Any) -> Any:
    """Acceptance that measures everything and demands nothing of random weights."""
    return dataclasses.replace(
        acceptance,
        targets=(),
        text=text,
        windows=4,
        window_tokens=CONTEXT,
        max_perplexity_increase=1000.0,
        max_mean_kl_nats=1000.0,
        max_reference_noise=1000.0,
        min_top1_agreement=0.0,
        chat=ChatSettings(prompts=8, max_new_tokens=8, min_source_stops=0),
        sustained=SustainedRun(),
        repeats=1,
    )
