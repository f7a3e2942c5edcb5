"""What is read from a builder's log: bytes and kernels by profile, errors without their tails."""

from __future__ import annotations

import pytest

from mla_deploy.engine.build_log import BuildLog, without_cuda_tail
from mla_deploy.engine.messages import log_errors, node_errors
from mla_deploy.engine.report import Kernel

_CUDA = (
    "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (In catchCudaError at "
    "/_src/common/dispatch/checkMacros.cpp:250 (cudaError 35: CUDA driver version is insufficient "
    "for CUDA runtime version))"
)
_LAYERS = """Layers:
Name: shape_myl0_0, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , \
StreamId: 0, Metadata:
Name: mm_myl0_1, LayerType: gemm, Inputs: [ { Name: x, Dimensions: [-1,64], Strides: [64,1], \
Datatype: Half, Format: (Linear) }], Constants: [ { Name: w, Dimensions: [64,32], Strides: \
[32,1]}, { Name: a, Dimensions: [1]}], Outputs: [ { Name: y, Dimensions: [-1,32]}], TacticName: t, \
StreamId: 0, Metadata: [ONNX Layer: mm]
Name: __myl_Relu_myl1_0, LayerType: kgen, Inputs: [ { Name: x [profile 1], Dimensions: [1,64]}], \
Constants: [], Outputs: [ { Name: y [profile 1], Dimensions: [1,32]}], TacticName: t
Name: inner_myl1_1, LayerType: kgen, Inputs: [], Constants: [], Outputs: [], TacticName: t
Bindings:
x"""


def test_profiles_are_told_apart() -> None:
    log = BuildLog()
    for text in (
        "Constructing optimization profile number 0 [1/2].",
        "Total Activation Memory: 8192000 bytes",
        "Constructing optimization profile number 1 [2/2].",
        "Total Activation Memory: 0 bytes",
        "Total Weights Memory: 16640 bytes",
        _LAYERS,
    ):
        log.take("VERBOSE", text)
    assert log.activation_bytes == {0: 8192000, 1: 0}
    assert log.weights_bytes == 16640
    assert not log.last_lines  # verbose lines are read, not kept
    first, second = log.kernels(2)
    assert [kernel.name for kernel in first] == ["shape_myl0_0", "mm_myl0_1"]
    assert first[1] == Kernel("mm_myl0_1", "gemm", ((-1, 64),), ((64, 32), (1,)), ((-1, 32),))
    assert [kernel.name for kernel in second] == ["__myl_Relu_myl1_0", "inner_myl1_1"]


def test_one_profile_has_every_kernel_whatever_its_number() -> None:
    """With one profile the builder may number its one group 1."""
    log = BuildLog()
    log.take("VERBOSE", _LAYERS.replace(" [profile 1]", ""))
    (only,) = log.kernels(1)
    assert len(only) == 4


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (_CUDA, ""),
        (f"Invalid Node - att\nITensor::getDimensions: Error Code 3: API Usage Error (att: wrong "
         f"(very). In validate at /_src/optimizer/api/layers/x.cpp:184)\n{_CUDA}",
         "att: wrong (very)"),
        ("IBuilder::buildSerializedNetwork: Error Code 4: API Usage Error (ITopKLayer: K exceeds "
         "the maximum value allowed (3840). In processCheck at /_src/a/b.cpp:1066 In analyzeShapes "
         "at /_src/a/b.cpp:2825)", "ITopKLayer: K exceeds the maximum value allowed (3840)"),
        ("ModelImporter.cpp:140: While parsing node number 0 [Bad -> \"y\"]:", ""),
        ("plain words", "plain words"),
    ],
)  # fmt: skip
def test_tails_are_cut(text: str, told: str) -> None:
    assert without_cuda_tail(text) == told


def test_warnings_that_say_nothing_are_left_out() -> None:
    log = BuildLog()
    log.take("WARNING", "ModelImporter.cpp:1071: Make sure input x has Int64 binding.")
    log.take("WARNING", "ImporterContext.hpp:501: A node named n already exists, the output ...")
    log.take("WARNING", "Unused Input: nonpad_kv_seqlen")
    log.take("WARNING", "Unused Input: nonpad_kv_seqlen")
    assert log.warnings == ["Unused Input: nonpad_kv_seqlen"]
    assert len(log.last_lines) == 4


def test_errors_that_nobody_has_met_are_shown_as_they_came() -> None:
    (error,) = log_errors([f"Error Code 9: Internal Error (a new thing)\n{_CUDA}", _CUDA])
    assert (error.message, error.fix, error.told) == ("a new thing", "", "a new thing")
    told = {"code": "UNSUPPORTED_NODE", "node": "n", "operator": "Op", "stack": ["f (F)"],
            "told": "false"}  # fmt: skip
    (error,) = node_errors([told])
    assert "does not support the operator" in error.message
    assert error.where == "f (F) > n (Op)"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("MyelinCheckException: moe_lowering.cpp:31: CHECK(decomposed.size() > 0) failed.",
         "mixture-of-experts"),
        ("graph_jit.cpp:278 CHECK(status == CUDA_SUCCESS)", "needs a GPU"),
        ("Tensor w has datatype FP8 but is not consumed by IPluginLayer, IDequantizeLayer",
         "fp8 weights"),
        ("Requested amount of memory could not be allocated: out of memory", "ran out of memory"),
        ("cache has type FP8 but must have type Float, Half, or BFloat16", "a cache of type FP8"),
    ],
)  # fmt: skip
def test_errors_that_small_graphs_do_not_raise(text: str, words: str) -> None:
    (error,) = log_errors([text])
    assert words in error.message and error.fix
