"""The binding to the card, on a stand-in that refuses what TensorRT-RTX refuses.

What the runner may call is compared with the names of the real package; loading takes a card.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tensorrt_rtx as trt
import yaml

from pipeline.core.errors import CorruptError, IncompatibleError, PipelineError, RecipeError
from pipeline.core.gpu import conditions_of
from pipeline.core.settings import data_dir
from pipeline.core.values import Engine, Limits
from pipeline.formats.trtrtx.spec import PACKAGE
from pipeline.runners.decode import DecoderSession, prefill
from pipeline.runners.onnxruntime import OnnxRuntimeGraph, graph_session
from pipeline.runners.tensorrt_rtx import _DTYPES, RtxDecoder, RtxEngine, TrtRtxRunner, row_groups
from tests.acceptance.test_conditions import nvml
from tests.formats.decoder.decoders import generate_greedy, random_prompt, write_graph
from tests.runners.trtrtx.engines import CONTEXT, MAX_BATCH, fake_tensorrt_rtx, write_plan

NOT_OF_THE_API = {"HostDevice", "Any", "Callable", "Enum"}
RAGGED = [random_prompt(length, seed=length) for length in (10, 1, 27, 3, 16)]

Load = Callable[..., RtxEngine]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = fake_tensorrt_rtx()
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", module)
    return module


@pytest.fixture(scope="module")
def graph_file(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_graph(model_dir, tmp_path_factory.mktemp("graph"), context=CONTEXT)


@pytest.fixture
def load(fake: ModuleType, graph_file: Path, tmp_path: Path) -> Load:
    def load_plan(kernels: Path = tmp_path / "kernels", **plan: Any) -> RtxEngine:
        path = write_plan(graph_file, tmp_path, **plan)
        return RtxEngine(path, fake.HostDevice(), kernels)

    return load_plan


def calls(monkeypatch: pytest.MonkeyPatch, owner: type, method: str) -> list[tuple[Any, ...]]:
    """Arguments of every later call of a method of the stand-in."""
    seen: list[tuple[Any, ...]] = []
    original = getattr(owner, method)

    def recorded(self: Any, *arguments: Any) -> Any:
        seen.append((self, *arguments))
        return original(self, *arguments)

    monkeypatch.setattr(owner, method, recorded)
    return seen


@pytest.mark.parametrize("batch", [1, 2, MAX_BATCH])
def test_logits_and_tokens_are_those_of_the_twin(
    load: Load, graph: OnnxRuntimeGraph, batch: int
) -> None:
    engine, prompts = load(), RAGGED[:batch]
    got = prefill(RtxDecoder(engine, batch), prompts)
    wanted = prefill(graph.bind(batch), prompts)
    np.testing.assert_allclose(got.logits, wanted.logits, rtol=0, atol=1e-4)
    tokens = generate_greedy(RtxDecoder(engine, batch), prompts, 20)
    np.testing.assert_array_equal(tokens, generate_greedy(graph.bind(batch), prompts, 20))


def test_a_cache_of_two_byte_elements_is_addressed_by_its_own_size(
    load: Load, graph: OnnxRuntimeGraph
) -> None:
    engine = load(cache="BF16")
    assert engine.row_bytes == 2 * CONTEXT * 16 * 2
    lengths = np.array([len(prompt) for prompt in RAGGED])
    asked = (np.full((MAX_BATCH, 1), 9), lengths, np.zeros((MAX_BATCH, 1), np.int64))
    rtx, twin = RtxDecoder(engine, MAX_BATCH), graph.bind(MAX_BATCH)
    prefill(rtx, RAGGED)
    prefill(twin, RAGGED)
    got = rtx.step(*asked)
    assert 0 < np.abs(got - twin.step(*asked)).max() < 0.2  # what it reads back is rounded
    for row, prompt in enumerate(RAGGED):
        alone = RtxDecoder(engine, 1)
        prefill(alone, [prompt])
        one = alone.step(*(part[row : row + 1] for part in asked))
        np.testing.assert_allclose(got[row], one[0], rtol=0, atol=2e-2)


@pytest.mark.parametrize(("prefill_logits", "steps"), [(1, 10), (4, 3), (CONTEXT, 1)])
def test_logits_of_every_position_come_in_as_few_steps_as_the_profiles_allow(
    load: Load,
    fake: ModuleType,
    graph: OnnxRuntimeGraph,
    monkeypatch: pytest.MonkeyPatch,
    prefill_logits: int,
    steps: int,
) -> None:
    engine = load(prefill_logits=prefill_logits)
    ran = calls(monkeypatch, fake.IExecutionContext, "execute_async_v3")
    logits = session_of(engine).logits(RAGGED[0])
    assert len(ran) == steps
    wanted = graph_session(graph).logits(RAGGED[0])
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-4)


def session_of(engine: RtxEngine) -> DecoderSession:
    per_step = engine.logits_per_step
    return DecoderSession(
        lambda n: RtxDecoder(engine, n), context=CONTEXT, logits_per_step=per_step
    )


def test_a_logit_that_is_no_number_is_never_an_answer(
    load: Load, fake: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """argmax finds the NaN, at 0: the stream would end as if the model had ended it."""
    monkeypatch.setattr(fake.HostDevice, "download", lambda *_: np.full((1, 1, 320), np.nan))
    with pytest.raises(CorruptError, match="not finite"):
        list(session_of(load()).stream(RAGGED[0], 4, frozenset({0})))


def test_past_and_present_are_one_memory_and_a_decode_step_sets_nothing_again(
    load: Load, fake: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load()
    bound = calls(monkeypatch, fake.IExecutionContext, "set_tensor_address")
    shaped = calls(monkeypatch, fake.IExecutionContext, "set_input_shape")
    decoder = RtxDecoder(engine, 2)
    generate_greedy(decoder, RAGGED[:2], 10)
    for name in engine.caches:
        addresses = [
            set(a for (_, n, a) in bound if n == f"{end}_{name}") for end in ("past", "present")
        ]
        assert len(addresses[0]) == 1
        assert addresses[0] == addresses[1]
    # Each tensor once for each of the two contexts.
    tensors = 4 + 2 * len(engine.caches)
    assert len(bound) == 2 * tensors
    assert len(shaped) == 2 * (3 + len(engine.caches))


def test_more_rows_than_the_engine_decodes_are_refused(load: Load) -> None:
    with pytest.raises(RecipeError, match=f"got 6 prompts; wanted 1 to {MAX_BATCH}"):
        RtxDecoder(load(), MAX_BATCH + 1)


def test_a_step_outside_every_profile_is_refused(load: Load) -> None:
    decoder = RtxDecoder(load(), 1)
    ids, start = np.full((1, 4), 5), np.zeros(1, np.int64)
    with pytest.raises(RecipeError, match=r"4 tokens and 2 logits a row.*1 to 48 tokens, 1 to 1"):
        decoder.step(ids, start, np.array([[0, 1]]))


@pytest.mark.parametrize(
    ("faults", "shown"),
    [
        ({"without": "logits"}, "it has .*"),
        ({"alias": None}, "past and present of .*'key.0'.* do not share memory"),
    ],
)
def test_an_engine_with_another_interface_is_refused(
    load: Load, faults: dict[str, Any], shown: str
) -> None:
    with pytest.raises(CorruptError, match=shown) as refused:
        load(faults=faults)
    assert "enginesmith build" in str(refused.value)


def test_an_empty_plan_is_corrupt(fake: ModuleType, tmp_path: Path) -> None:
    plan = tmp_path / "model.engine"
    plan.touch()
    with pytest.raises(CorruptError, match=r"model.engine cannot be read: .*pull the package"):
        RtxEngine(plan, fake.HostDevice(), tmp_path)


@pytest.mark.parametrize(
    ("method", "shown"),
    [
        ("execute_async_v3", "refuses a step"),
        ("set_tensor_address", "refuses the memory of logits"),
        ("set_optimization_profile_async", "refuses profile 0"),
    ],
)
def test_a_refusal_of_the_library_is_an_error(
    load: Load, fake: ModuleType, monkeypatch: pytest.MonkeyPatch, method: str, shown: str
) -> None:
    monkeypatch.setattr(fake.IExecutionContext, method, lambda *_: False)
    with pytest.raises(PipelineError, match=shown):
        prefill(RtxDecoder(load(), 1), [[5]])


def test_a_refused_shape_is_not_taken_for_set(
    load: Load, fake: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = RtxDecoder(load(), 1)
    with monkeypatch.context() as broken:
        broken.setattr(fake.IExecutionContext, "set_input_shape", lambda *_: False)
        with pytest.raises(PipelineError, match=r"refuses shape \(1, 2\) of input_ids"):
            prefill(decoder, [[5, 6]])
    assert np.isfinite(prefill(decoder, [[5, 6]]).logits).all()


def test_kernels_are_kept_from_one_load_to_the_next(
    load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cache" / "kernels"
    for length in (4, 5):
        engine = load(file)
        prefill(RtxDecoder(engine, 1), [[5] * length])
        engine.save_runtime_cache()
    assert b"(1, 4)" in file.read_bytes()
    assert b"(1, 5)" in file.read_bytes()
    assert [path.name for path in file.parent.iterdir()] == ["kernels"]
    file.write_bytes(b"of another driver")
    engine = load(file)
    assert "does not fit here" in capsys.readouterr().err
    engine.save_runtime_cache()
    assert file.read_bytes().startswith(b"fake kernels")


@pytest.mark.parametrize(
    ("batch", "max_rows", "row_bytes", "groups"),
    [
        (8, 8, 100, [(0, 8)]),
        (10, 8, 256, [(0, 8), (8, 10)]),
        (10, 3, 128, [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10)]),
        (9, 8, 64, [(0, 8), (8, 9)]),
    ],
)
def test_groups_of_rows_start_at_aligned_addresses(
    batch: int, max_rows: int, row_bytes: int, groups: list[tuple[int, int]]
) -> None:
    assert row_groups(batch, max_rows, row_bytes) == groups


def test_every_name_that_the_runner_may_use_is_in_the_real_package() -> None:
    """Classes, methods and members of enumerations of the stand-in."""
    assert trt.__version__ == "1.7.1.116"
    assert set(_DTYPES) <= set(trt.DataType.__members__)
    for name, fake in vars(fake_tensorrt_rtx()).items():
        if isinstance(fake, type) and not name.startswith("_") and name not in NOT_OF_THE_API:
            real = getattr(trt, name)
            missing = [one for one in vars(fake) if one[0] != "_" and not hasattr(real, one)]
            assert not missing, f"{name} has no {missing}"


SETTINGS = yaml.safe_load((data_dir("conf") / "runner" / "tensorrt_rtx.yaml").read_text())
RUNNER = TrtRtxRunner(**{name: SETTINGS[name] for name in SETTINGS if name != "kind"})
ENGINE = Engine(
    dir=Path("/engine"),
    digest="0" * 64,
    format="trtrtx",
    variant="sm89-trtrtx-fp8-b4-s128",
    runtime=("tensorrt-rtx", "1.7.1.116"),
    sms=(89,),
    limits=Limits(max_batch_size=4, max_seq_len=128, max_num_tokens=256, kv_cache_dtype="bfloat16"),
    min_vram_bytes=0,
)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Versions that count as installed; a test changes them."""
    versions = {PACKAGE: "1.7.1.116", "torch": "2.13.0"}

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr("pipeline.runners.runner.version", version)
    return versions


def card(monkeypatch: pytest.MonkeyPatch, sm: tuple[int, int] | None) -> None:
    found = None if sm is None else conditions_of(nvml(DeviceGetCudaComputeCapability=sm), 0)
    monkeypatch.setattr("pipeline.runners.tensorrt_rtx.read_conditions", lambda: found)


def test_it_runs_where_all_is_there(
    installed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    card(monkeypatch, (8, 9))
    assert RUNNER.why_not(ENGINE) is None


@pytest.mark.parametrize(
    ("package", "found", "sm", "shown"),
    [
        (PACKAGE, "1.7.0.1", (8, 9), "which compiled the engine; got 1.7.0.1: pip install"),
        (PACKAGE, None, (8, 9), "got none: pip install tensorrt-rtx-cu13==1.7.1.116"),
        ("torch", "2.13.0+cpu", (8, 9), "PyTorch built for CUDA.*got 2.13.0.cpu"),
        ("torch", "2.13.0", None, "needs a CUDA device of SM 89, and NVML shows this process none"),
        ("torch", "2.13.0", (9, 0), "H100.* has SM 90: build with its target"),
    ],
)
def test_a_machine_that_does_not_fit_is_told(
    installed: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    package: str,
    found: str | None,
    sm: tuple[int, int] | None,
    shown: str,
) -> None:
    card(monkeypatch, sm)
    installed.pop(package)
    if found is not None:
        installed[package] = found
    reason = RUNNER.why_not(ENGINE) or ""
    assert re.search(shown, reason)
    assert reason.endswith("or take runner=onnxruntime, its graph on a CPU")


def test_the_program_that_is_shipped_reports_why_it_cannot_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a card, and from another folder."""
    monkeypatch.setenv("ENGINESMITH_CACHE", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(IncompatibleError, match="sees no CUDA device"):  # noqa: SIM117
        with RUNNER.open(dataclasses.replace(ENGINE, dir=tmp_path)):
            pass
