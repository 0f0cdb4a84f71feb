"""An engine's answers beside those of its source and of its checkpoint, on the same questions."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pipeline.acceptance.acceptance import Acceptance
from pipeline.acceptance.chat_judge import chat_findings
from pipeline.acceptance.chat_probe import Answer, ChatProbe
from pipeline.acceptance.harness import harness_findings, run_harness
from pipeline.acceptance.quality import SourceFigures, figures_against, summarize_quality
from pipeline.acceptance.reference import Reference, reference_of
from pipeline.acceptance.source import Source
from pipeline.acceptance.subject import Measured, Subject
from pipeline.core.cache import StageCache
from pipeline.formats.spec import format_spec
from pipeline.machine import available_bytes
from pipeline.model.hf import load_tokenizer
from pipeline.runners.session import Session
from pipeline.sources.text.corpus import pack_windows

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What the source says, ready for the comparison."""

    asked: Acceptance
    subject: Subject
    windows: NDArray[np.int64]
    source: SourceFigures
    chat: ChatProbe | None
    source_chat: tuple[Answer, ...]
    source_tasks: Mapping[str, Any] | None
    reference: Reference | None
    no_reference: str
    """Why there is none; empty where it would say nothing new."""

    @classmethod
    def of(
        cls, asked: Acceptance, subject: Subject, source: Source, cache: StageCache
    ) -> Comparison:
        tokenizer = load_tokenizer(subject.engine.dir)
        windows = pack_windows(
            asked.text.documents(),
            tokenizer,
            seq_len=asked.window_tokens,
            count=asked.windows,
            seed=None,
        )
        chat = None
        if asked.chat is not None:
            chat = ChatProbe.prepare(
                load_tokenizer(subject.weights.dir),
                tokenizer,
                asked.chat,
                context=subject.engine.limits.max_seq_len,
            )
        figures = source.figures(windows)
        reference, no_reference = _reference(asked, subject, windows, figures, cache)
        return cls(
            asked=asked,
            subject=subject,
            windows=windows,
            source=figures,
            chat=chat,
            source_chat=source.chat(chat) if chat else (),
            source_tasks=_tasks(asked, subject, source.session) if asked.lm_eval else None,
            reference=reference,
            no_reference=no_reference,
        )

    def compare(self, session: Session) -> Measured:
        """The engine against the source."""
        asked = self.asked
        beside = [self.source, *([self.reference.figures] if self.reference else [])]
        figures = figures_against(session.logits, self.windows, beside)
        quality = summarize_quality(self.source.nll, figures[0], asked.seed)
        if self.reference:
            quality["fp8_reference"] = {
                **self.reference.to_json(self.source, figures[1], asked.seed),
                # A card computes in 16 bit, with an FP8 KV cache even; the floor has neither.
                "judged": self.subject.runner.device == "cpu",
            }
        not_run = (f"FP8 reference: {self.no_reference}",) if self.no_reference else ()
        found = Measured(quality=quality, not_run=not_run)
        if self.chat is not None:
            log.info("The engine answers %d chat prompts", len(self.chat.asked))
            chat = self.chat.ask_engine(session, self.source_chat)
            for shown in chat.get("answers", ())[:1]:
                log.info("%s: %s", shown["name"], shown["engine"]["text"].replace("\n", " "))
            found = replace(found, chat=chat, findings=tuple(chat_findings(chat)))
        if asked.lm_eval is None or self.source_tasks is None:
            return found
        tasks = _tasks(asked, self.subject, session)
        worse = harness_findings(self.source_tasks, tasks, asked.lm_eval.max_drop)
        return replace(
            found,
            lm_eval={"source": self.source_tasks, "engine": tasks},
            findings=(*found.findings, *worse),
        )


def _reference(
    asked: Acceptance,
    subject: Subject,
    windows: NDArray[np.int64],
    source: SourceFigures,
    cache: StageCache,
) -> tuple[Reference | None, str]:
    """What the checkpoint itself says; else why it is not asked."""
    engine = subject.engine
    if subject.simulated:
        return None, ""  # it is the reference
    is_checkpoint = format_spec(engine.format).is_checkpoint
    folder = engine.dir if is_checkpoint else subject.checkpoint_dir
    if folder is None:
        return None, "the package of a compiled engine has no checkpoint"
    reason = asked.too_much(subject.plan.request.shape, available_bytes())
    if reason:
        return None, f"its simulation {reason}"
    # A checkpoint package is named by its own digest: it holds an lm_head that its source may not.
    digest = subject.package_digest if is_checkpoint else folder.name
    few = windows[: asked.reference_windows]
    return reference_of(folder, digest, few, source, engine.limits.max_seq_len, cache), ""


def _tasks(asked: Acceptance, subject: Subject, session: Session) -> dict[str, Any]:
    """Results of the lm-eval harness for one session."""
    assert asked.lm_eval is not None
    log.info("lm-eval: %s", ", ".join(asked.lm_eval.tasks))
    return run_harness(
        session,
        load_tokenizer(subject.engine.dir),
        asked.lm_eval,
        context=subject.engine.limits.max_seq_len,
        seed=asked.seed,
    )
