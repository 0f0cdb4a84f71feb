"""What source, checkpoint and engine answer to the same questions, and how the engine compares.

The source's answers are computed once and kept: an engine is always compared with the same numbers.

An engine differs from its source by FP8, which is in the checkpoint, and by what a runtime makes of
the checkpoint. The reference, the checkpoint simulated in float32 PyTorch (`quant.simulate`), has
the first difference and not the second. Two right runtimes of one FP8 checkpoint never agree token
by token: sums in another order move a value over the edge of an FP8 code, and all later layers
differ. So the engine is held against the reference's distance from itself, its linears summed from
the last input to the first.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.acceptance.acceptance import Acceptance, Subject
from pipeline.acceptance.chat import Answer, ChatProbe, chat_findings
from pipeline.acceptance.quality import (
    EngineFigures,
    SourceFigures,
    agreement,
    figures_against,
    load_figures,
    save_figures,
    source_figures,
    summarize_quality,
)
from pipeline.core.cache import Stage, StageCache, require_files
from pipeline.core.errors import CorruptError
from pipeline.core.values import Finding, Weights
from pipeline.formats.spec import format_spec
from pipeline.formats.trtrtx.onnx_graph import CPU_CUT, cut_layers
from pipeline.machine import available_bytes
from pipeline.model.hf import load_tokenizer
from pipeline.quant.simulate import load_simulation, reverse_sums
from pipeline.quant.spec import SHAPING_CODE
from pipeline.quant.unified import UnifiedCheckpoint
from pipeline.runners.onnxruntime import OnnxRuntimeGraph, graph_session
from pipeline.runners.runner import Session
from pipeline.runners.transformers import TransformersSession
from pipeline.sources.text.corpus import pack_windows

log = logging.getLogger(__name__)

_MODEL_CODE = ("pipeline.runners", *SHAPING_CODE)
"""What computes logits of a source or of a checkpoint."""
FIGURES = Stage(name="source-logits", version=2, code=("pipeline.acceptance.quality", *_MODEL_CODE))
CHAT = Stage(name="source-chat", version=2, code=("pipeline.acceptance.chat", *_MODEL_CODE))
REFERENCE = Stage(
    name="reference-logits",
    version=3,
    code=(
        "pipeline.acceptance.answers",
        "pipeline.acceptance.quality",
        *_MODEL_CODE,
    ),
)
_ANSWERS = "answers.json"
_AGAINST_SOURCE, _NOISE = "source-", "noise-"
MAX_MEDIAN_DIFFERENCE = 1e-3
"""Largest median over positions of the largest logit difference, where the noise is below it. Two
layers of SmolLM2 agree to 3e-5 at the median; single positions differ by up to 0.2 where a last-bit
difference flips an E4M3 code (2026-11-24)."""
NOISE_FACTOR = 2.0
"""How much more than the simulation differs from itself is allowed. A wide model has so many codes
that some flip at every position: two layers of Phi-3's shape differ by 0.074 at the median, and the
simulation from itself by 0.076 when its linears only add up in float64 (2026-11-25)."""
_TOKENS = 48


@dataclass(kw_only=True)
class Measured:
    """Parts of the report by their keys, what they found, and what was left out, and why."""

    parts: dict[str, Any] = field(default_factory=lambda: {"speed": (), "quality": {}})
    findings: list[Finding] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)


class Source:
    """The source model; loaded when something is asked that is not kept yet."""

    def __init__(
        self,
        weights: Weights,
        cache: StageCache,
        opener: Callable[[], AbstractContextManager[Session]],
        runtime: str,
    ) -> None:
        """Load nothing yet; `runtime` names what executes it: other runtimes, other numbers."""
        self._cache = cache
        self._weights = weights
        self._opener = opener
        self._key = {"weights": weights.digest, "runtime": runtime, "tools": _tools()}
        self._stack = ExitStack()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *exception: object) -> None:
        self.__dict__.pop("session", None)
        self._stack.close()
        _give_back_memory()

    @cached_property
    def session(self) -> Session:
        require_files(self._weights.dir, self._weights.files)
        return self._stack.enter_context(self._opener())

    def figures(self, windows: NDArray[np.int64]) -> SourceFigures:
        result = self._cache.run(
            FIGURES,
            {**self._key, "windows": _sha256(windows)},
            lambda out: save_figures(source_figures(self.session.logits, windows)[0], out),
        )
        return load_figures(SourceFigures, result.dir)

    def chat(self, probe: ChatProbe) -> tuple[Answer, ...]:
        def write(out: Path) -> None:
            log.info("The source answers %d chat prompts", len(probe.asked))
            answers = [asdict(given) for given in probe.ask_source(self.session)]
            (out / _ANSWERS).write_text(json.dumps(answers))

        result = self._cache.run(
            CHAT,
            {
                **self._key,
                "prompts": [list(one.source) for one in probe.asked],
                "max_new_tokens": probe.settings.max_new_tokens,
                "eos": sorted(probe.source_eos),
            },
            write,
        )
        return tuple(
            Answer(tokens=tuple(given["tokens"]), stopped=given["stopped"])
            for given in result.read_json(_ANSWERS)
        )


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The checkpoint's own figures of the first windows, against the source, and its noise.

    `noise`: the checkpoint, its sums rounded otherwise, against itself.
    """

    figures: SourceFigures
    against_source: EngineFigures
    noise: EngineFigures

    def to_json(self, source: SourceFigures, engine: EngineFigures, seed: int) -> dict[str, Any]:
        """The report's `checkpoint_reference`; `engine`: it against this reference."""
        few = len(self.against_source.kl)
        own = summarize_quality(source.nll[:few], self.against_source, seed)
        return {
            "windows": few,
            "perplexity": own["engine_perplexity"],
            **{key: own[key] for key in ("perplexity_change", "mean_kl_nats", "top1_agreement")},
            "engine": agreement(engine, seed),
            "noise_floor": agreement(self.noise, seed),
        }


def _tools() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers")}


def _sha256(values: NDArray[Any]) -> str:
    return hashlib.sha256(values.tobytes()).hexdigest()


def _give_back_memory() -> None:
    """Free a model that is not used any more, before the next one is loaded beside it.

    Its modules hold each other, so only the collector finds them; and the C library keeps what is
    freed, about 2 GB for SmolLM2, unless it is told not to.
    """
    gc.collect()
    with contextlib.suppress(AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)


def reference_of(
    checkpoint_dir: Path,
    digest: str,
    windows: NDArray[np.int64],
    source: SourceFigures,
    context: int,
    cache: StageCache,
) -> Reference:
    """Simulate a checkpoint over the windows [W, N], or take what an earlier run kept.

    `digest` names its bytes, `source` knows these windows, and perhaps more; `context` in tokens.
    """

    def write(out: Path) -> None:
        model = load_simulation(checkpoint_dir, context=context)
        logits = TransformersSession(model).logits
        own, (against,) = source_figures(logits, windows, "Checkpoint", [source])
        reverse_sums(model)
        (noise,) = figures_against(logits, windows, [own], "Noise floor")
        del model, logits
        _give_back_memory()
        for figures, prefix in ((own, ""), (against, _AGAINST_SOURCE), (noise, _NOISE)):
            save_figures(figures, out, prefix)

    result = cache.run(
        REFERENCE,
        {
            "checkpoint": digest,
            "context": context,
            "windows": _sha256(windows),
            "source": _sha256(source.nll),
            "tools": _tools(),
        },
        write,
    )
    return Reference(
        figures=load_figures(SourceFigures, result.dir),
        against_source=load_figures(EngineFigures, result.dir, _AGAINST_SOURCE),
        noise=load_figures(EngineFigures, result.dir, _NOISE),
    )


class Comparison:
    """What source and checkpoint say, ready for an engine."""

    def __init__(
        self, asked: Acceptance, subject: Subject, source: Source, cache: StageCache
    ) -> None:
        """Ask the source, then the checkpoint once the source is out of memory."""
        self._asked, self._subject = asked, subject
        tokenizer = load_tokenizer(subject.engine.dir)
        self._windows = pack_windows(
            asked.text.documents(),
            tokenizer,
            seq_len=asked.window_tokens,
            count=asked.windows,
            seed=None,
        )
        self._chat: ChatProbe | None = None
        if asked.chat is not None:
            self._chat = ChatProbe.prepare(
                load_tokenizer(subject.weights.dir),
                tokenizer,
                asked.chat,
                context=subject.engine.limits.max_seq_len,
            )
        with source:
            self._source = source.figures(self._windows)
            self._source_chat = source.chat(self._chat) if self._chat else ()
        self._reference, self._no_reference = self._find_reference(cache)

    def compare(self, session: Session) -> Measured:
        asked, found, reference = self._asked, Measured(), self._reference
        beside = [self._source, *([reference.figures] if reference else [])]
        figures = figures_against(session.logits, self._windows, beside)
        quality = summarize_quality(self._source.nll, figures[0], asked.seed)
        found.parts["quality"] = quality
        if reference:
            quality["checkpoint_reference"] = {
                **reference.to_json(self._source, figures[1], asked.seed),
                # A card computes in 16 bit, with an FP8 KV cache even; the floor has neither.
                "judged": self._subject.runner.device == "cpu",
            }
        if self._no_reference:
            found.not_run.append(f"the checkpoint itself: {self._no_reference}")
        if self._chat is not None:
            log.info("The engine answers %d chat prompts", len(self._chat.asked))
            found.parts["chat"] = chat = self._chat.ask_engine(session, self._source_chat)
            for shown in chat.get("answers", ())[:1]:
                log.info("%s: %s", shown["name"], shown["engine"]["text"].replace("\n", " "))
            found.findings += chat_findings(chat)
        return found

    def _find_reference(self, cache: StageCache) -> tuple[Reference | None, str]:
        """What the checkpoint itself says; else why it is not asked, if that is worth a word."""
        asked, subject, engine = self._asked, self._subject, self._subject.engine
        if subject.runner.name == "transformers":
            return None, ""  # it is the reference
        is_checkpoint = format_spec(engine.format).is_checkpoint
        folder = engine.dir if is_checkpoint else subject.checkpoint_dir
        if folder is None:
            return None, "the package of a compiled engine has no checkpoint"
        if reason := asked.too_much(subject.plan.request.shape, available_bytes()):
            return None, f"its simulation {reason}"
        # A checkpoint package is named by its own digest: it holds an lm_head its source may not.
        digest = subject.package_digest if is_checkpoint else folder.name
        few, context = self._windows[: asked.reference_windows], engine.limits.max_seq_len
        return reference_of(folder, digest, few, self._source, context, cache), ""


def compare_cut(checkpoint_dir: Path, graphs_dir: Path) -> dict[str, Any]:
    """Compare two layers of the graph on ONNX Runtime with a simulation of the checkpoint.

    CorruptError if they differ by more than the simulation in another summation order.
    """
    checkpoint = UnifiedCheckpoint(checkpoint_dir)
    layers = cut_layers(checkpoint)
    tokens = np.random.default_rng(0).integers(0, checkpoint.spec.vocab_size, _TOKENS).tolist()
    model = load_simulation(checkpoint_dir, layers=layers)
    simulated = TransformersSession(model).logits(tokens)
    again = TransformersSession(reverse_sums(model)).logits(tokens)
    graph = graph_session(OnnxRuntimeGraph(graphs_dir / CPU_CUT)).logits(tokens)
    worst = np.abs(simulated - graph).max(axis=-1)  # [tokens]
    median = float(np.median(worst))
    noise = float(np.median(np.abs(simulated - again).max(axis=-1)))
    allowed = max(MAX_MEDIAN_DIFFERENCE, NOISE_FACTOR * noise)
    if not median <= allowed:
        raise CorruptError(
            f"layers {layers} of the graph differ from a simulation of the checkpoint "
            f"by {median:.2g} at the median position, {allowed:.2g} is allowed: "
            "this is a bug in the converter, please report it with the model's config.json"
        )
    return {
        "layers": list(layers),
        "positions": _TOKENS,
        "median_difference": median,
        "median_noise": noise,
        "positions_within_1e-3": int((worst <= 1e-3).sum()),
    }
