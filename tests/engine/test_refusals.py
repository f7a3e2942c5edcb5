"""Every error of TensorRT's parser and builder that we know, raised by the real TensorRT-RTX.

In our words: by node, with a fix, and with no word about CUDA.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from mla_deploy.engine.build_graph import build_engine
from mla_deploy.engine.request import BuildRequest
from mla_deploy.errors import MlaDeployError
from tests.engine.small_graphs import F16, F32, I64, chain, constant, model, node, saved, weight

pytest.importorskip("tensorrt_rtx")

ONE = {"x": ((1, 16), (2, 16), (4, 16))}
Y = [("y", F16, ["B", 16])]
X = [("x", F16, ["B", 16])]


def refusal(made: onnx.ModelProto | Path, folder: Path, *profiles: Any) -> MlaDeployError:
    """What a build for SM 7.5 and 8.6 is refused with."""
    path = made if isinstance(made, Path) else saved(made, folder)
    request = BuildRequest("tensorrt_rtx", "rtx-1.7", str(path), str(folder / "decode.plan"),
                           ("7.5", "8.6"), profiles)  # fmt: skip
    with pytest.raises(MlaDeployError) as caught:
        build_engine(request, [str(index) for index in range(len(profiles))])
    assert not (folder / "decode.plan").exists()
    return caught.value


def attention(query: int = 16, value: int = 16, **attributes: Any) -> onnx.ModelProto:
    outputs = attributes.pop("outputs", ["y"])
    return model(
        [node("Attention", ["q", "k", "v"], outputs, name="att", **attributes)],
        [("q", F16, [1, 4, 8, query]), ("k", F16, [1, 1, 8, query]), ("v", F16, [1, 1, 8, value])],
        [("y", F16, [1, 4, 8, value])],
    )  # fmt: skip


def scatter(
    shape: list[Any], *, through: bool = False, hidden: bool = False, **attributes: Any
) -> Any:
    nodes = [node("Identity", ["cache"], ["copy"])] if through else []
    nodes.append(node("TensorScatter", ["copy" if through else "cache", "new", "at"], ["kept"],
                      name="scatter", axis=-2, **attributes))  # fmt: skip
    if hidden:
        nodes.append(node("Relu", ["kept"], ["y"]))
    return model(
        nodes,
        [("cache", F16, shape), ("new", F16, [*shape[:-2], 1, shape[-1]]), ("at", I64, [1])],
        [("y" if hidden else "kept", F16, shape)],
    )  # fmt: skip


def product_of(packed: onnx.TensorProto, scale: float) -> onnx.ModelProto:
    return model(
        [node("DequantizeLinear", ["w", "s"], ["real"], name="dq"),
         node("MatMul", ["x", "real"], ["y"])], X, Y, [packed, constant("s", scale, np.float16)],
    )  # fmt: skip


def packed(dtype: int) -> onnx.TensorProto:
    return helper.make_tensor("w", dtype, [16, 16], np.ones(256, np.float32))


def scatter_add(operator: str, *index: int) -> onnx.ModelProto:
    return model([node(operator, ["x", "i", "u"], ["y"], name="add", reduction="add")],
                 [*X, ("i", I64, ["B", *index]), ("u", F16, ["B", 16])], Y)  # fmt: skip


def inside_function() -> onnx.ModelProto:
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("x.y", 1)]
    body = [node("Nope", ["a"], ["c"], domain="x.y", name="inner")]
    bad = helper.make_function("my", "Bad", ["a"], ["c"], body, opsets)
    return chain(("Bad", {"domain": "my", "name": "outer"}), functions=[bad])


# case -> (code, model, profile, where, words of the message, words of the hint)
CASES: dict[str, tuple[str, onnx.ModelProto, Any, str, str, str]] = {
    "unknown operator": ("BLD-PARSE", chain(("Relu", {}), ("Nope", {"domain": "my", "name": "n"})),
                         ONE, "n (Nope)", "no such operator", "plugin"),
    "in a function": ("BLD-PARSE", inside_function(), ONE, "outer (Bad) > inner (Nope)",
                      "no such operator", "plugin"),
    "known, unsupported": ("BLD-PARSE", chain(("BitwiseNot", {"name": "bits"})), ONE,
                           "bits (BitwiseNot)", "does not support the operator", "export"),
    "NonZero": ("BLD-PARSE", model([node("NonZero", ["x"], ["y"], name="nz")], X,
                                   [("y", I64, [2, "n"])]),
                ONE, "nz (NonZero)", "no such operator", "export"),
    "two types": ("BLD-PARSE", model([node("Add", ["x", "w"], ["y"], name="sum")], X, Y,
                                     [weight("w", 16, dtype=np.float32)]),
                  ONE, "sum (Add)", "one input is Half, the other Float", "Cast"),
    "cos of fp32": ("BLD-PARSE",
                    model([node("RotaryEmbedding", ["x", "c", "s", "p"], ["y"], name="rope")],
                          [("x", F16, [1, 2, 4, 16]), ("c", F32, [64, 8]), ("s", F32, [64, 8]),
                           ("p", I64, [1, 4])], [("y", F16, [1, 2, 4, 16])]),
                    None, "rope (RotaryEmbedding)", "tables are Float", "type"),
    "product": ("BLD-PARSE", model([node("MatMul", ["x", "b"], ["y"], name="mm")],
                                   [*X, ("b", F16, [15, 16])], Y),
                ONE, "mm (MatMul)", "16 columns with 15 rows", "export"),
    "head widths": ("BLD-PARSE", attention(24, 16), None, "att (Attention)", "one width", "pad"),
    "attention outputs": ("BLD-PARSE", attention(outputs=["y", "", "", "z"]), None,
                          "att (Attention)", "one output", "cache"),
    "softcap": ("BLD-PARSE", attention(softcap=2.0), None, "att (Attention)", "softcap", "Tanh"),
    "heads of 576": ("BLD-BUILD", attention(576, 576), None, "", "no fused attention",
                     "TRT_decomposable"),
    "rank 3": ("BLD-PARSE", scatter([1, 64, 24]), None, "scatter (TensorScatter)", "3D",
               "head axis"),
    "ring": ("BLD-PARSE", scatter([1, 1, 64, 24], mode="circular"), None,
             "scatter (TensorScatter)", "circular", "ScatterND"),
    "dynamic capacity": ("BLD-PARSE", scatter([1, 1, "M", 24]), None, "scatter (TensorScatter)",
                         "dynamic", "--capacity"),
    "cache of a node": ("BLD-BUILD", scatter([1, 1, 64, 24], through=True), None, "",
                        "not a graph input", "nothing between"),
    "cache kept inside": ("BLD-BUILD", scatter([1, 1, 64, 24], hidden=True), None, "",
                          "not a graph output", "output"),
    "ScatterElements adds": ("BLD-PARSE", scatter_add("ScatterElements", 16), ONE, "",
                             "adds", "zeros"),
    "ScatterND adds": ("BLD-PARSE", scatter_add("ScatterND", 1), ONE, "add (ScatterND)", "adds",
                       "zeros"),
    "top 4000": ("BLD-BUILD", model([node("TopK", ["x", "k"], ["y", "i"], name="top")],
                                    [("x", F16, [1, 8000])],
                                    [("y", F16, [1, 4000]), ("i", I64, [1, 4000])],
                                    [constant("k", [4000])]),
                 None, "", "more than 3840", "two steps"),
    "scale of zero": ("BLD-PARSE", product_of(packed(TensorProto.INT8), 0.0), ONE,
                      "dq (DequantizeLinear)", "zero or negative", "positive"),
    "uint4": ("BLD-PARSE", product_of(packed(TensorProto.UINT4), 1.0), ONE, "", "uint4", "int4"),
    "fp8 on SM 8.6": ("BLD-BUILD", product_of(packed(TensorProto.FLOAT8E4M3FN), 1.0), ONE, "",
                      "fp8_e4m3 does not exist on", "8.9"),
    "fp32 product on SM 7.5": (
        "BLD-BUILD", model([node("MatMul", ["x", "w"], ["y"], name="mm")], [("x", F32, [4, 16])],
                           [("y", F32, [4, 16])], [weight("w", 16, 16, dtype=np.float32)]),
        None, "", "mm is a product in fp32", "7.5"),
    "no profile": ("BLD-BUILD", chain(("Relu", {})), None, "", "no profile", "--profile"),
    "min above max": ("BLD-PROFILE", chain(("Relu", {})), {"x": ((4, 16), (1, 16), (1, 16))}, "",
                      "min <= opt <= max", "order"),
    "another fixed size": ("BLD-BUILD", chain(("Relu", {})), {"x": ((1, 8),) * 3}, "",
                           "axis 1 of x the sizes 8..8, the graph fixes it at 16", "size"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_tensorrt_refuses_in_our_words(case: str, tmp_path: Path) -> None:
    code, made, profile, where, words, hint = CASES[case]
    error = refusal(made, tmp_path, *([profile] if profile else []))
    assert error.code == code, error
    assert words in error.message and where in error.message, error.message
    assert hint in error.hint
    assert "cuda" not in error.message.lower() and "/_src/" not in str(error.details["errors"])
    assert error.details["errors"][0]["told"]


def test_several_errors_are_told_at_once(tmp_path: Path) -> None:
    made = chain(("Nope", {"domain": "my"}), ("Relu", {}), ("BitwiseNot", {}))
    error = refusal(made, tmp_path, ONE)
    assert [entry["operator"] for entry in error.details["errors"]] == ["Nope", "BitwiseNot"]


def test_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "decode.onnx").write_bytes(b"garbage")
    error = refusal(tmp_path / "decode.onnx", tmp_path)
    assert (error.code, error.exit_status) == ("BLD-PARSE", 4)
    assert "not an ONNX model" in error.message


def test_a_tensor_that_nothing_makes(tmp_path: Path) -> None:
    made = chain(("Relu", {"name": "first"}))
    made.graph.node[0].input[0] = "undefined"
    error = refusal(made, tmp_path, ONE)
    assert "first (Relu): the node reads a tensor that nothing produces" in error.message


@pytest.mark.parametrize("left", [None, 8])
def test_a_weight_file_is_named(tmp_path: Path, left: int | None) -> None:
    path = saved(model([node("MatMul", ["x", "w"], ["y"])], X, Y, [weight("w", 16, 16)]), tmp_path)
    (tmp_path / "decode.onnx.data").unlink()
    if left is not None:
        (tmp_path / "decode.onnx.data").write_bytes(b"\0" * left)
    error = refusal(path, tmp_path, ONE)
    assert "a weight file is missing or too short" in error.message
    assert "decode.onnx.data" in error.details["errors"][0]["told"]
