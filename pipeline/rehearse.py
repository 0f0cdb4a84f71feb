"""`enginesmith rehearse`: the whole line on random weights, in every format that a recipe offers.

Everything goes into one throw-away folder: weights, cache, runs and a registry that is marked as a
rehearsal's. A format whose compiler cannot work on this machine goes as far as it can, and the
result says where it stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shlex
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from pipeline.acceptance.chat import ChatSettings
from pipeline.acceptance.sustained import SustainedRun
from pipeline.answer import Answer, screen_logging
from pipeline.build import build
from pipeline.config.compose import ConfigFolders, config_folders
from pipeline.config.load import load
from pipeline.config.recipe import Recipe
from pipeline.core.cache import StageCache, digest_folder
from pipeline.core.errors import ConflictError, ExitCode, IncompatibleError
from pipeline.core.ownership import make_own
from pipeline.core.values import Licence, Weights
from pipeline.formats.spec import CardCompiler, format_spec
from pipeline.machine import require_builder
from pipeline.model.hf import write_random_model
from pipeline.model.read import read_spec
from pipeline.model.spec import ModelSpec
from pipeline.outcome import failure_of
from pipeline.quant.spec import quant_spec, select
from pipeline.registry.package import mark_throwaway
from pipeline.registry.stores.folder import FolderRegistry
from pipeline.sources.text.topics import PydocTopics

log = logging.getLogger(__name__)

CONTEXT = 128
"""Longest request of the small engine, tokens; beyond its model's window, if that has one."""
LAYERS = 5
"""Enough that a recipe which keeps its first four layers in 16 bits still has FP8 ones."""
_MIN_HEADS = 4
_MIN_HEAD_DIM, _MAX_HEAD_DIM = 16, 32
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
Composed = Mapping[str, tuple[Recipe, Mapping[str, Any]]]
"""Compiler name -> the recipe composed with it, and its plain configuration."""
_WORDS = {"good": "done", "stopped": "as far as this machine goes", "failed": "FAILED"}


@dataclass(frozen=True)
class Rehearsed:
    """How far a format (name of the compiler) went; `state` is a key of `_WORDS`."""

    format: str
    state: str
    reached: str
    detail: str
    exit_code: ExitCode = ExitCode.OK
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "exit_code": int(self.exit_code), "seconds": round(self.seconds, 2)}


def run_rehearsal(
    recipe: str,
    overrides: Sequence[str],
    *,
    full_size: bool,
    keep: Path | None,
    config_dir: Path | None,
) -> Answer:
    """Rehearse a recipe; exits with the code of the first format that failed.

    An override that chooses a compiler rehearses that one only; with `full_size` only the weights
    are random; `keep` is an empty folder for what is made, None throws it away.
    """
    started = time.perf_counter()
    composed = compose(recipe, overrides, config_folders(config_dir))
    for engine_format in composed:
        require_builder(engine_format)
    # What the registry logs is of a key and of packages that are thrown away.
    logging.getLogger("pipeline.registry").setLevel(logging.WARNING)
    with screen_logging(), _folder(keep) as folder:
        mark_throwaway(folder / "registry")
        done = [_rehearse(name, *one, folder, full_size) for name, one in composed.items()]
    seconds = time.perf_counter() - started
    code = next((result.exit_code for result in done if result.exit_code), ExitCode.OK)
    table = Table("format", "state", "reached", "s")
    for one in done:
        table.add_row(one.format, _WORDS[one.state], one.reached, f"{one.seconds:.0f}")
    details = [f"{one.format}: {one.detail}" for one in done if one.state != "good"]
    size = "full size" if full_size else "a tiny model of the same architecture"
    verdict = "good" if code is ExitCode.OK else "failed"
    summary = f"Rehearsal of {recipe} {verdict}: random weights, {size}; {seconds:.0f} s"
    return Answer(
        value={
            "recipe": recipe,
            "seconds": round(seconds, 2),
            "formats": [result.to_json() for result in done],
        },
        shown=[table, *details, summary, *([f"Kept in {keep}"] if keep is not None else [])],
        exit_code=code,
        message="\n".join([summary, *details]),
    )


def compose(recipe: str, overrides: Sequence[str], folders: ConfigFolders) -> Composed:
    """The recipe with each compiler that can have it (sizes, precision, shape); its own first."""
    job = load(recipe, overrides, folders=folders)
    composed: dict[str, tuple[Recipe, Mapping[str, Any]]] = {
        job.value.compiler.format: (job.value, job.config)
    }
    if any(override.split("=")[0] == "compiler" for override in overrides):
        return composed
    for name in folders.options("compiler"):
        other = load(recipe, [*overrides, f"compiler={name}"], folders=folders)
        made = format_spec(name)
        able = made.holds(quant_spec(job.value.quantizer.precision))
        if name in composed or other.faults:
            continue
        if able and not made.shape_faults(job.value.shape):
            composed[name] = (other.value, other.config)
    return composed


@contextlib.contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="enginesmith-rehearsal-") as folder:
            yield Path(folder)
        return
    if keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise ConflictError(f"{keep} exists and is not empty; name a new folder")
    make_own(keep, "--keep", 0o755, team=True)
    yield keep


def _rehearse(
    name: str, recipe: Recipe, config: Mapping[str, Any], folder: Path, full_size: bool
) -> Rehearsed:
    log.info("Rehearsing compiler=%s", name)
    started = time.perf_counter()
    run_dir = folder / "runs" / name
    run_dir.mkdir(parents=True)
    try:
        done = _run(name, _shrink(recipe, folder, full_size), config, run_dir)
    except Exception as error:
        failure = failure_of(error)
        done = Rehearsed(name, "failed", "", failure.message, failure.exit_code)
    return dataclasses.replace(done, seconds=time.perf_counter() - started)


def _shrink(recipe: Recipe, folder: Path, full_size: bool) -> Recipe:
    shape: ModelSpec = recipe.shape
    compiler: Any = recipe.compiler
    if not full_size:
        shape, names = small_spec(shape), {field.name for field in dataclasses.fields(compiler)}
        sizes = {name: size for name, size in _SIZES.items() if name in names}
        compiler = dataclasses.replace(compiler, **sizes)
    made: Recipe = on_random_weights(recipe, shape, folder / "weights")
    return dataclasses.replace(
        made,
        compiler=compiler,
        acceptance=small_acceptance(recipe.acceptance, PydocTopics(part="judge")),
        registry=FolderRegistry(path=folder / "registry"),
    )


def _run(name: str, recipe: Recipe, config: Mapping[str, Any], run_dir: Path) -> Rehearsed:
    """Build it; where the compiler cannot work here, do what comes before it."""
    folder, compiler = run_dir.parent.parent, recipe.compiler
    if isinstance(compiler, CardCompiler):
        try:
            compiler.check_machine(recipe.target)
        except IncompatibleError as error:
            reached = _convert(recipe, compiler, folder / "cache")
            reason = str(error).splitlines()[0]
            detail = f"{reason}; not run: {shlex.join(compiler.command)}"
            return Rehearsed(name, "stopped", reached, detail)
    # A key of its own, in CI too: a rehearsal proves nothing, and leaves nothing behind.
    environ = {"ENGINESMITH_CONFIG": str(folder / "config")}
    outcome = build(recipe, run_dir, config=config, cache_dir=folder / "cache", environ=environ)
    good = outcome.exit_code is ExitCode.OK
    state, code = ("good", ExitCode.OK) if good else ("failed", ExitCode.NOT_ACCEPTED)
    return Rehearsed(name, state, f"package {outcome.reference}", outcome.message, code)


def _convert(recipe: Recipe, compiler: CardCompiler, cache_dir: Path) -> str:
    cache = StageCache(root=cache_dir)
    checkpoint = recipe.quantizer.quantize(recipe.source.fetch(), recipe.calibration, cache)
    size_bytes = sum(file.size_bytes for file in compiler.convert(checkpoint, cache).files)
    return f"{compiler.format} checkpoint, {size_bytes / 1e6:.1f} MB, every tensor checked"


@dataclass(frozen=True, kw_only=True)
class RandomSource:
    """Random weights of a shape, written into a folder; `documents` are for the tokenizer."""

    shape: ModelSpec
    folder: Path
    documents: tuple[str, ...]

    @property
    def terms(self) -> Licence:
        return _TERMS

    def fetch(self) -> Weights:
        if not self.folder.exists():
            self.folder.mkdir(parents=True)
            documents = list(self.documents)
            write_random_model(self.shape, self.folder, documents=documents, seed=0)
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
    head_dim = min(max(_MIN_HEAD_DIM, attention.head_dim // 4), _MAX_HEAD_DIM)
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
    pairs = attention.rope.rotary_dim * head_dim // attention.head_dim // 2
    for section in ("rope_scaling", "rope_parameters"):
        if small.get(section):
            small[section] = _small_rope(small[section], pairs)
    small = _small_rope(small, pairs)
    if spec.window is not None:
        small["sliding_window"] = CONTEXT // 4
    if len(set(spec.windows)) > 1:
        kinds = ["sliding_attention" if window else "full_attention" for window in spec.windows]
        slices = [kinds[first : first + layers] for first in range(spec.num_layers - layers + 1)]
        small["layer_types"] = max(slices, key=lambda one: len(set(one)))
    elif "layer_types" in small:
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
