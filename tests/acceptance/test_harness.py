"""Tasks of lm_eval on a session; without the library, what is said instead."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.acceptance.harness import (
    HarnessSettings,
    check_harness,
    harness_findings,
    run_harness,
)
from pipeline.core.errors import CorruptError, IncompatibleError, PipelineError, RecipeError
from pipeline.model.hf import load_tokenizer
from pipeline.runners.onnxruntime import graph_session
from pipeline.runners.runner import Session
from pipeline.runners.transformers import open_source
from tests.formats.decoder.decoders import open_graph, write_graph
from tests.tiny import tiny_model

INSTALLED = importlib.util.find_spec("lm_eval") is not None
needs_library = pytest.mark.skipif(not INSTALLED, reason="lm_eval is not installed (extra eval)")
CONTEXT = 192
QUESTIONS = [
    {"question": "The engine reads the", "choices": ["weights", "model", "split"], "answer": 0},
    {"question": "A small model answers", "choices": ["well", "quickly", "a"], "answer": 1},
    {"question": "Numbers such as", "choices": ["digits", "1", "large", "into 23"], "answer": 1},
    {"question": "It writes every", "choices": [" token", " engine"], "answer": 0},
]
COMMON = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
metadata: {{version: 1.0}}
"""
TASKS = {
    "tiny_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "tiny_answer": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["STOP"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "tiny_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}]
""",
}
EVERY = HarnessSettings(tasks=("tiny_choice", "tiny_answer", "tiny_text"))


def settings(folder: Path, *tasks: str, **changes: Any) -> HarnessSettings:
    return HarnessSettings(tasks=tasks or EVERY.tasks, include_path=folder, **changes)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tasks with data of its own: no network."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "data.jsonl"
    data.write_text("".join(f"{json.dumps(question)}\n" for question in QUESTIONS))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(COMMON.format(name=name, data=data) + text)
    return folder


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def source(model_dir: Path) -> Iterator[Session]:
    with open_source(model_dir) as session:
        yield session


@pytest.fixture(scope="module")
def engine(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Session:
    out = tmp_path_factory.mktemp("graph")
    return graph_session(open_graph(write_graph(model_dir, out, context=CONTEXT)))


def values(result: dict[str, Any]) -> dict[str, float]:
    return {
        f"{task} {name}": metric["value"]
        for task, found in result["tasks"].items()
        for name, metric in found["metrics"].items()
    }


@pytest.mark.skipif(INSTALLED, reason="lm_eval is installed")
def test_missing_library_is_told_before_any_work() -> None:
    with pytest.raises(IncompatibleError, match=r"pip install '\.\[eval\]'"):
        check_harness(EVERY)


@needs_library
def test_unknown_task_and_folder_are_recipe_faults(tasks: Path, tmp_path: Path) -> None:
    check_harness(settings(tasks))
    check_harness(HarnessSettings(tasks=("mmlu",)))
    with pytest.raises(RecipeError, match=r"acceptance\.lm_eval\.tasks: no such task: tiny_chois;"):
        check_harness(settings(tasks, "tiny_choice", "tiny_chois"))
    with pytest.raises(RecipeError, match=r"include_path: .*missing is no folder"):
        check_harness(settings(tmp_path / "missing"))


@needs_library
def test_figures_are_those_of_the_librarys_own_model(
    source: Session, engine: Session, model_dir: Path, tasks: Path
) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from pipeline.model.hf import load_model

    tokenizer = load_tokenizer(model_dir)
    own = HFLM(
        pretrained=load_model(model_dir, "float32"), tokenizer=tokenizer, device="cpu",
        max_length=CONTEXT - 1,
    )  # fmt: skip
    expected = lm_eval.simple_evaluate(
        model=own, tasks=list(EVERY.tasks), task_manager=TaskManager(include_path=str(tasks))
    )["results"]
    for session in (source, engine):
        found = run_harness(session, tokenizer, settings(tasks), context=CONTEXT, seed=0)
        assert values(found) == {
            "tiny_choice acc": pytest.approx(expected["tiny_choice"]["acc,none"]),
            "tiny_answer exact_match": expected["tiny_answer"]["exact_match,none"],
            "tiny_text word_perplexity": pytest.approx(
                expected["tiny_text"]["word_perplexity,none"], rel=1e-3
            ),
        }
        assert found["truncated"] == 0
        assert json.loads(json.dumps(found)) == found
    choice = found["tasks"]["tiny_choice"]
    assert choice["samples"] == 4
    assert choice["metrics"]["acc"]["higher_is_better"] is True
    assert choice["metrics"]["acc"]["stderr"] > 0
    assert found["tasks"]["tiny_text"]["metrics"]["word_perplexity"]["higher_is_better"] is False


@needs_library
def test_likelihoods_and_answers_are_those_of_the_librarys_own_model(
    engine: Session, model_dir: Path
) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from pipeline.acceptance.harness_model import SessionModel
    from pipeline.model.hf import load_model

    tokenizer = load_tokenizer(model_dir)
    ours = SessionModel(engine, tokenizer, 24)
    own = HFLM(
        pretrained=load_model(model_dir, "float32"), tokenizer=tokenizer, device="cpu",
        max_length=23,
    )  # fmt: skip

    def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
        return [Instance(kind, {}, pair, index) for index, pair in enumerate(arguments)]

    pairs = asked(
        "loglikelihood",
        ("The engine", " reads"), ("The engine", " reads the weights"), ("", "Numbers"),
        ("space behind ", "it"), ("long " * 12, "end"),
    )  # fmt: skip
    scores = ours.loglikelihood(pairs)
    expected = own.loglikelihood(pairs)
    assert [value for value, _ in scores] == pytest.approx([v for v, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in scores] == [greedy for _, greedy in expected]
    assert ours.truncated == 1
    texts = asked("loglikelihood_rolling", ("The engine reads. " * 6,), ("One.",))
    assert ours.loglikelihood_rolling(texts) == pytest.approx(
        own.loglikelihood_rolling(texts), abs=1e-2
    )
    options = {"until": [], "max_gen_toks": 6}
    whole = ours._generate("The engine", options)
    stop = whole[2:4]
    prompts = asked(
        "generate_until", ("The engine", {**options, "until": [stop]}), ("The", options)
    )
    assert ours.generate_until(prompts) == own.generate_until(prompts)
    assert ours.generate_until(prompts)[0] == whole[: whole.index(stop)]


@needs_library
def test_limit_and_chat_template_reach_the_library(
    source: Session, model_dir: Path, tasks: Path
) -> None:
    tokenizer = load_tokenizer(model_dir)
    plain = run_harness(
        source, tokenizer, settings(tasks, "tiny_choice", limit=2), context=CONTEXT, seed=0
    )
    assert plain["tasks"]["tiny_choice"]["samples"] == 2

    class Watched:
        prompts: list[str] = []  # noqa: RUF012 - of this test only

        def stream(self, prompt: Sequence[int], *_: Any) -> Iterator[int]:
            self.prompts.append(tokenizer.decode(prompt))
            yield from ()

    asked = settings(tasks, "tiny_answer", limit=1, apply_chat_template=True)
    run_harness(Watched(), tokenizer, asked, context=CONTEXT, seed=0)  # type: ignore[arg-type]
    assert Watched.prompts == [
        "<|im_start|>user\nThe engine reads the<|im_end|>\n<|im_start|>assistant\n"
    ]


@needs_library
def test_what_a_session_cannot_do_is_told(source: Session, model_dir: Path, tasks: Path) -> None:
    tokenizer = load_tokenizer(model_dir)
    for changed, told in (
        ("do_sample: true", "wants sampled answers"),
        ("temperature: 0.7, do_sample: false", "wants sampled answers"),
        ("max_gen_toks: 192, do_sample: false", "wants answers of 192 tokens, the context has 192"),
    ):
        text = (tasks / "tiny_answer.yaml").read_text()
        name = f"tiny_other_{len(changed)}"
        text = text.replace("tiny_answer", name).replace(
            "max_gen_toks: 8, do_sample: false", changed
        )
        (tasks / f"{name}.yaml").write_text(text)
        with pytest.raises(PipelineError, match=told):
            run_harness(source, tokenizer, settings(tasks, name), context=CONTEXT, seed=0)
    broken = SimpleNamespace(logits=lambda tokens: np.full((len(tokens), 320), np.nan, np.float32))
    with pytest.raises(CorruptError, match="not finite"):
        run_harness(broken, tokenizer, settings(tasks, "tiny_choice"), context=99, seed=0)
    with pytest.raises(PipelineError, match="asks for the likelihood of"):
        run_harness(source, tokenizer, settings(tasks, "tiny_choice"), context=3, seed=0)


def result(value: float, higher: bool | None = True) -> dict[str, Any]:
    metric = {"value": value, "stderr": None, "higher_is_better": higher}
    return {"tasks": {"task": {"metrics": {"acc": metric}}}}


@pytest.mark.parametrize(
    ("source", "engine", "higher", "kinds"),
    [
        (0.5, 0.4375, True, []),
        (0.5, 0.4374, True, ["regression"]),
        (0.5, 0.9, True, []),
        (8.0, 8.0625, False, []),
        (8.0, 8.0626, False, ["regression"]),
        (8.0, 20.0, None, []),
        (20.0, 8.0, None, []),
        (0.5, math.nan, True, ["regression"]),
    ],
)
def test_drop_beyond_the_limit_is_a_regression(
    source: float, engine: float, higher: bool | None, kinds: list[str]
) -> None:
    before, after = result(source, higher), result(engine, higher)
    assert [finding.kind for finding in harness_findings(before, after, 0.0625)] == kinds
    assert list(harness_findings(before, after, None)) == []
