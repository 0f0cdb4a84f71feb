"""The stand-in against the real package: what the runner may call is what TensorRT-RTX has.

Loading an engine takes a card, so here the package is asked for its names and what it does without.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tensorrt_rtx as trt

from pipeline.core.errors import IncompatibleError
from pipeline.formats.trtrtx.graph_writer import WEIGHTS_FILE, write_weights
from pipeline.formats.trtrtx.onnx_graph import ActivationDtype, build_decoder, save_graph
from pipeline.quant.unified import UnifiedCheckpoint
from pipeline.runners.trtrtx import signature as signature_module
from pipeline.runners.trtrtx.engine import RtxEngine
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


def test_the_version_is_the_one_that_was_read() -> None:
    assert trt.__version__ == "1.7.1.116"


def test_every_name_that_the_runner_may_use_is_in_the_package() -> None:
    """Classes, methods and members of enumerations of the stand-in."""
    for name, fake in vars(fake_tensorrt_rtx()).items():
        if isinstance(fake, type) and not name.startswith("_") and name not in NOT_OF_THE_API:
            real = getattr(trt, name)
            missing = [one for one in vars(fake) if one[0] != "_" and not hasattr(real, one)]
            assert not missing, f"{name} has no {missing}"


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


class NoDevice:
    """No card: nothing of it may be asked for before an engine is loaded."""


def test_without_a_card_the_real_package_loads_nothing_and_it_is_told(tmp_path: Path) -> None:
    plan = tmp_path / "model.engine"
    plan.write_bytes(b"vtrt" + bytes(300))
    with pytest.raises(IncompatibleError, match=r"cannot load .*validity INVALID"):
        RtxEngine(plan, NoDevice(), "eager", None)  # type: ignore[arg-type]
