"""The stand-in against the real package: what the runner may call is what TensorRT-RTX has.

Loading an engine takes a card, so here the package is asked for its classes, its signatures (from
the docstrings that its binding writes) and what it does without one.
"""

from __future__ import annotations

import ast
import inspect
import re
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import tensorrt_rtx as trt

from pipeline.core.errors import IncompatibleError
from pipeline.formats.trtrtx.graph_writer import WEIGHTS_FILE, write_weights
from pipeline.formats.trtrtx.onnx_graph import ActivationDtype, build_decoder, save_graph
from pipeline.quant.unified import UnifiedCheckpoint
from pipeline.runners.trtrtx import engine as engine_module
from pipeline.runners.trtrtx import signature as signature_module
from pipeline.runners.trtrtx.engine import LoadSettings, RtxEngine
from pipeline.runners.trtrtx.signature import read_signature
from tests.runners.trtrtx.engines import (
    COMPILER,
    CONTEXT,
    MAX_BATCH,
    MAX_PREFILL,
    fake_tensorrt_rtx,
)
from tests.tiny import VOCAB_SIZE

NOT_OF_THE_API = {"HostDevice", "Any", "Callable", "Enum"}
_RETURNS = {"ICudaEngine | None": "ICudaEngine", "IExecutionContext | None": "IExecutionContext"}
"""The binding does not write that None is possible."""
_SAME = {
    "bool": "bool",
    "int": "int",
    "None": "None",
    "str | None": "str",
    "str": "str",
    "list[str]": "list[str]",
    "tuple[int, ...]": "Dims",
    "list[tuple[int, ...]]": "list[Dims]",
    "tuple[EngineValidity, int]": "tuple",
    "bytes": "IHostMemory",
}
"""Annotation of the stand-in -> what the binding writes, where these differ or are plain."""


def public(owner: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(owner).items() if not name.startswith("_")}


def classes(*, enums: bool) -> list[Any]:
    made = []
    for name, value in public(fake_tensorrt_rtx()).items():
        if not isinstance(value, type) or name in NOT_OF_THE_API:
            continue
        if issubclass(value, Enum) == enums:
            made.append(pytest.param(value, id=name))
    return made


def overloads(method: Any) -> list[tuple[list[tuple[str, bool]], str]]:
    """(parameter, has a default) without self, and the return type, of each overload."""
    name = re.escape(method.__name__)
    found = []
    for match in re.finditer(rf"(?m)^\s*(?:\d+\. )?{name}\((self: .*)\) -> (.+)$", method.__doc__):
        parts = re.split(r", (?=\w+: )", match.group(1))[1:]
        parameters = [(part.split(":")[0], " = " in part) for part in parts]
        found.append((parameters, match.group(2).strip()))
    return found


def short(type_name: str) -> str:
    """Without modules: `tensorrt_rtx_bindings.tensorrt_rtx.Dims`, `nvinfer1::IRuntimeCache`."""
    return re.sub(r"[\w.]*\.|\w+::", "", type_name)


def test_the_version_is_the_one_that_was_read() -> None:
    assert trt.__version__ == "1.7.1.116"


@pytest.mark.parametrize("fake", classes(enums=True))
def test_every_enumeration_has_the_members_that_the_stand_in_has(fake: type[Enum]) -> None:
    real = getattr(trt, fake.__name__)
    assert {member.name for member in fake} <= set(real.__members__)
    assert all(real.__members__[member.name].name == member.name for member in fake)


@pytest.mark.parametrize("fake", classes(enums=False))
def test_every_method_takes_and_gives_what_the_stand_in_does(fake: type) -> None:
    real = getattr(trt, fake.__name__)
    for name, member in public(fake).items():
        assert hasattr(real, name), f"{fake.__name__}.{name}"
        if not inspect.isfunction(member):
            if isinstance(member, property):
                assert isinstance(vars(real)[name], property)
            continue
        wanted = list(inspect.signature(member).parameters)[1:]
        returned = str(inspect.signature(member).return_annotation)
        written = _SAME.get(returned, _RETURNS.get(returned, returned))
        matching = [
            (parameters, result)
            for parameters, result in overloads(getattr(real, name))
            if [p for p, _ in parameters[: len(wanted)]] == wanted
            and all(default for _, default in parameters[len(wanted) :])
            and short(result) == written
        ]
        assert matching, (
            f"{fake.__name__}.{name}({wanted}) -> {written}: {overloads(getattr(real, name))}"
        )


def test_every_name_that_the_runner_takes_from_the_package_is_there() -> None:
    used = set()
    for module in (engine_module, signature_module):
        for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("trt."):
                used.add(ast.unparse(node))
    assert {"trt.Runtime", "trt.TensorIOMode.INPUT", "trt.Logger.WARNING"} <= used
    for name in used:
        found: Any = trt
        for part in name.split(".")[1:]:
            found = getattr(found, part)


class ParsedEngine:
    """The interface of a parsed network in the methods of an engine, which takes a card to load.

    Names, modes, types and shapes are the package's own objects; profiles are the compiler's.
    """

    num_optimization_profiles = len(COMPILER.profiles)

    def __init__(self, network: Any) -> None:
        self._inputs = {
            tensor.name: tensor for tensor in map(network.get_input, range(network.num_inputs))
        }
        outputs = map(network.get_output, range(network.num_outputs))
        self._tensors = {**self._inputs, **{tensor.name: tensor for tensor in outputs}}
        self.num_io_tensors = len(self._tensors)

    def get_tensor_name(self, index: int) -> str:
        return str(list(self._tensors)[index])

    def get_tensor_mode(self, name: str) -> Any:
        return trt.TensorIOMode.INPUT if name in self._inputs else trt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return self._tensors[name].dtype

    def get_tensor_shape(self, name: str) -> Any:
        return self._tensors[name].shape

    def get_tensor_profile_shape(self, name: str, index: int) -> Any:
        sizes = tuple(self._tensors[name].shape)
        return [trt.Dims(shape) for shape in COMPILER.profiles[index].shapes(name, sizes)]

    def get_aliased_input_tensor(self, name: str) -> str:
        return name.replace("present_", "past_")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_parsed_graph_has_the_interface_that_the_runner_wants(
    model_dir: Path, tmp_path: Path, dtype: ActivationDtype
) -> None:
    checkpoint = UnifiedCheckpoint(model_dir)
    slots = write_weights(checkpoint, tmp_path / WEIGHTS_FILE)
    model = build_decoder(checkpoint, slots, context=CONTEXT, activation=dtype)
    save_graph(model, tmp_path / "rtx.onnx")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(network, logger).parse_from_file(str(tmp_path / "rtx.onnx"))
    signature = read_signature(ParsedEngine(network))
    assert signature.caches == tuple(f"{part}.{n}" for n in range(3) for part in ("key", "value"))
    assert (signature.cache_shape, signature.cache_dtype) == ((2, CONTEXT, 16), dtype)
    assert (signature.vocab_size, signature.max_batch) == (VOCAB_SIZE, MAX_BATCH)
    assert signature.logits_per_step == 1
    assert [profile.sequence for profile in signature.profiles] == [(1, 1), (1, CONTEXT)]
    assert [profile.batch for profile in signature.profiles] == [(1, MAX_BATCH), (1, MAX_PREFILL)]


def test_names_of_types_are_those_of_the_package() -> None:
    assert set(signature_module._DTYPES) <= set(trt.DataType.__members__)


@pytest.mark.parametrize("choice", ["lazy", "eager", "none"])
def test_every_choice_of_specialization_is_one_of_the_package(choice: str) -> None:
    assert choice.upper() in trt.DynamicShapesKernelSpecializationStrategy.__members__


class NoDevice:
    """No card: nothing of it may be asked for before an engine is loaded."""


def test_without_a_card_the_real_package_loads_nothing_and_it_is_told(tmp_path: Path) -> None:
    plan = tmp_path / "model.engine"
    plan.write_bytes(b"vtrt" + bytes(300))
    settings = LoadSettings(kernel_specialization="eager", runtime_cache=None)
    with pytest.raises(IncompatibleError, match=r"cannot load .*validity INVALID"):
        RtxEngine(plan, NoDevice(), settings)  # type: ignore[arg-type]
