"""A recipe made small, on random weights: the same architecture, fusions and ratios, in seconds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.acceptance.chat import ChatSettings
from pipeline.acceptance.sustained import SustainedRun
from pipeline.core.cache import digest_folder
from pipeline.core.values import Licence, Weights
from pipeline.model.hf import write_random_model
from pipeline.model.read import read_spec
from pipeline.model.spec import ModelSpec
from pipeline.quant.spec import select
from pipeline.sources.text.topics import PydocTopics

CONTEXT = 128
"""Longest request of the small engine, tokens; beyond its model's window, if that has one."""
LAYERS = 5
"""Enough that a recipe which keeps its first four layers in 16 bits still has FP8 ones."""
_MIN_HEADS = 4
_MIN_HEAD_DIM = 16
"""TensorRT-RTX 1.7.1 has no attention kernel for fewer query heads or smaller heads."""
_SIZES = {
    "max_batch_size": 2,
    "opt_batch_size": 1,
    "max_prefill_batch_size": 1,
    "max_seq_len": CONTEXT,
    "max_num_tokens": CONTEXT,
}
_VOCAB = 512
_MAX_POSITION = 256
_TERMS = Licence(spdx="CC0-1.0", files=("LICENSE",), redistribution="allowed")


@dataclass(frozen=True, kw_only=True)
class RandomSource:
    """Random weights of a shape, written into a folder; `documents` are for the tokenizer."""

    shape: ModelSpec
    folder: Path
    documents: tuple[str, ...]
    seed: int = 0

    @property
    def terms(self) -> Licence:
        return _TERMS

    def fetch(self) -> Weights:
        if not self.folder.exists():
            self.folder.mkdir(parents=True)
            documents = list(self.documents)
            write_random_model(self.shape, self.folder, documents=documents, seed=self.seed)
        return Weights(
            dir=self.folder,
            origin=f"random:{self.shape.architecture}",
            commit=None,
            files=digest_folder(self.folder),
            licence=_TERMS,
            note="a rehearsal: these weights are random numbers",
            random=True,
        )


def small_spec(spec: ModelSpec) -> ModelSpec:
    """The spec with fewer layers and smaller sizes.

    Kept: architecture, ties, biases, rope kind and theta, the ratio of query to key heads, and
    whether the heads together are as wide as the residual stream. A sliding window stays shorter
    than the small engine's context, so that it matters.
    """
    attention = spec.layers[0].attention
    ratio = attention.heads // attention.kv_heads
    kv_heads = -(-_MIN_HEADS // ratio)
    heads = ratio * kv_heads
    head_dim = max(_MIN_HEAD_DIM, attention.head_dim // 4)
    square = spec.hidden_size == attention.heads * attention.head_dim
    hidden = heads * head_dim if square else 2 * heads * head_dim
    layers = min(LAYERS, spec.num_layers)
    small = {
        **spec.config,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": _VOCAB,
        "max_position_embeddings": _MAX_POSITION,
    }
    pairs = spec.rope.rotary_dim * head_dim // attention.head_dim // 2
    for section in ("rope_scaling", "rope_parameters"):
        if small.get(section):
            small[section] = _small_rope(small[section], pairs)
    small = _small_rope(small, pairs)
    if spec.window is not None:
        small["sliding_window"] = CONTEXT // 4
    if "layer_types" in small:
        small["layer_types"] = small["layer_types"][:layers]
    return read_spec(small)


def _small_rope(settings: Mapping[str, Any], pairs: int) -> dict[str, Any]:
    """For a short context: the first factors of LongRoPE, one for each pair."""
    small = dict(settings)
    for name in ("short_factor", "long_factor"):
        if name in small:
            small[name] = small[name][:pairs]
    if small.get("original_max_position_embeddings"):
        small["original_max_position_embeddings"] = _MAX_POSITION // 4
    return small


def small_settings(settings: Any) -> Any:
    """A compiler's settings with small sizes; every other choice stays as the recipe made it."""
    names = {field.name for field in dataclasses.fields(settings)}
    return dataclasses.replace(settings, **{k: v for k, v in _SIZES.items() if k in names})


def on_random_weights(recipe: Any, shape: ModelSpec, folder: Path) -> Any:
    """The recipe on random weights of a shape, calibrated on little text; nothing is downloaded."""
    text = PydocTopics(part="calibrate")
    # A quantizer refuses patterns for layers that a small shape lacks.
    kept = [one for one in recipe.quantizer.keep_16bit if select([one], shape.modules)]
    return dataclasses.replace(
        recipe,
        shape=shape,
        source=RandomSource(shape=shape, folder=folder, documents=text.documents()),
        calibration=dataclasses.replace(
            recipe.calibration, text=text, calib_size=2, seq_len=CONTEXT, batch_size=2
        ),
        quantizer=dataclasses.replace(recipe.quantizer, keep_16bit=tuple(kept)),
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
