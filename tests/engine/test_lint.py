"""The linter says no, with the fix, to each thing that TensorRT takes and gets wrong.

And to nothing else: a whole decode layer passes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from mla_deploy.engine.lint import lint_graph, require_clean
from mla_deploy.engine.lint_finding import LintFinding
from mla_deploy.errors import InputError
from tests.engine.small_graphs import (
    CAPACITY,
    F16,
    F32,
    I64,
    ROW,
    chain,
    constant,
    decode_layer,
    model,
    node,
    saved,
    weight,
)


@dataclass(frozen=True)
class ReleaseDouble:
    """A release with every operator of these tests."""

    name: str = "rtx-1.7"
    opset: int = 24
    operators: frozenset[str] = frozenset(
        "Add Attention Cast Concat Constant DequantizeLinear Gather Identity MatMul Relu Reshape "
        "RotaryEmbedding ScatterElements ScatterND Slice Softmax TensorScatter TopK Transpose "
        "Unsqueeze trt::TRT_Attention".split()
    )


RELEASE = ReleaseDouble()
ONE = {"x": ((1, 16), (2, 16), (4, 16))}


def found(made: onnx.ModelProto, folder: Path, *profiles: Any, **options: Any) -> dict[str, Any]:
    """The findings by check."""
    path = saved(made, folder)
    findings = lint_graph(path, options.pop("release", RELEASE), profiles, **options)
    return {finding.check: finding for finding in findings}


def attention(query: int = 16, value: int = 16, **attributes: Any) -> onnx.ModelProto:
    inputs = attributes.pop("inputs", ["q", "k", "v"])
    outputs = attributes.pop("outputs", ["y"])
    return model(
        [node("Attention", inputs, outputs, name="att", **attributes)],
        [("q", F16, [1, 4, 8, query]), ("k", F16, [1, 1, 8, query]), ("v", F16, [1, 1, 8, value]),
         ("n", I64, [1])],
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
    rows = [*shape[:-2], 1, shape[-1]]
    return model(
        nodes, [("cache", F16, shape), ("new", F16, rows), ("at", I64, [1])],
        [("y" if hidden else "kept", F16, shape)],
    )  # fmt: skip


def quantised(scale: float, dtype: int = TensorProto.INT8) -> onnx.ModelProto:
    packed = helper.make_tensor("w", dtype, [16, 16], np.ones(256, np.float32))
    return model(
        [node("DequantizeLinear", ["w", "s"], ["real"], name="dq"),
         node("MatMul", ["x", "real"], ["y"])],
        [("x", F16, ["B", 16])], [("y", F16, ["B", 16])],
        [packed, constant("s", scale, np.float16)],
    )  # fmt: skip


def test_a_whole_decode_layer_passes(tmp_path: Path) -> None:
    cache = ((1, 1, CAPACITY, ROW),) * 3
    profile = {"input_ids": ((1, 1),) * 3, "cache_lengths": ((1,),) * 3, "new_lengths": ((1,),) * 3,
               "latent_cache.0": cache, "latent_cache.1": cache}  # fmt: skip
    assert found(decode_layer(2), tmp_path, profile, sms=("7.5",)) == {}


GRAPHS: dict[str, tuple[str, Any, str, str]] = {
    "value heads narrower": ("attention-widths", attention(24, 16), "24, 24, 16", "pad"),
    "heads of 576": ("attention-fused-width", attention(576, 576), "576", "MatMul"),
    "nonpad_kv_seqlen": (
        "attention-lengths",
        attention(inputs=["q", "k", "v", "", "", "", "n"]),
        "nonpad_kv_seqlen",
        "kv_lengths",
    ),
    "attention scores": (
        "attention-outputs", attention(outputs=["y", "", "", "z"]), "2", "Scatter",
    ),
    "attention past": (
        "attention-outputs", attention(inputs=["q", "k", "v", "", "k", "v"]), "past", "Scatter",
    ),
    "softcap": ("attention-softcap", attention(softcap=3.0), "3", "Tanh"),
    "cache of rank 3": ("cache-rank", scatter([1, 64, 24]), "rank 3", "head axis"),
    "dynamic capacity": (
        "cache-capacity", scatter([1, 1, "capacity", 24]), "capacity", "--capacity",
    ),
    "cache behind a node": ("cache-input", scatter([1, 1, 64, 24], through=True), "copy", "input"),
    "cache kept inside": ("cache-output", scatter([1, 1, 64, 24], hidden=True), "output", "output"),
    "ring": ("cache-mode", scatter([1, 1, 64, 24], mode="circular"), "circular", "ScatterND"),
    "opset 99": ("opset", chain(("Relu", {}), opset=99), "99", "export"),
    "opset 6": ("opset", chain(("Relu", {}), opset=6), "6", "export"),
    "operator": ("operator", chain(("Elu", {})), "Elu", "export"),
    "own operator": ("operator", chain(("Nope", {"domain": "my.own"})), "my.own::Nope", "plugin"),
    "scatter that adds": (
        "scatter-reduction",
        model(
            [node("ScatterElements", ["x", "i", "x"], ["y"], name="add", reduction="add")],
            [("x", F16, [4, 16]), ("i", I64, [4, 16])], [("y", F16, [4, 16])],
        ),
        "add", "zeros",
    ),
    "top 4000": (
        "top-k",
        model(
            [node("TopK", ["x", "k"], ["y", "i"], name="top")],
            [("x", F16, [1, 8000])], [("y", F16, [1, 4000]), ("i", I64, [1, 4000])],
            [constant("k", [4000])],
        ),
        "4000", "two steps",
    ),
    "uint4": ("unsigned-weights", quantised(1.0, TensorProto.UINT4), "uint4", "signed"),
    "scale of zero": ("scales", quantised(0.0), "0", "quantise"),
    "negative scale": ("scales", quantised(-0.5), "-0.5", "quantise"),
    "fp16 plus fp32": (
        "types-alike",
        model(
            [node("Add", ["x", "w"], ["y"], name="sum")],
            [("x", F16, ["B", 16])], [("y", F16, ["B", 16])], [weight("w", 16, dtype=np.float32)],
        ),
        "float16 and float", "Cast",
    ),
    "cos of fp32": (
        "rotation-types",
        model(
            [node("RotaryEmbedding", ["x", "c", "s", "p"], ["y"], name="rope")],
            [("x", F16, [1, 2, 4, 16]), ("c", F32, [64, 8]), ("s", F32, [64, 8]),
             ("p", I64, [1, 4])],
            [("y", F16, [1, 2, 4, 16])],
        ),
        "float16 and float", "cos",
    ),
    "fp32 product on SM 7.5": (
        "products-of-gpu",
        model([node("MatMul", ["x", "w"], ["y"], name="mm")], [("x", F32, ["B", 16])],
              [("y", F32, ["B", 16])], [weight("w", 16, 16, dtype=np.float32)]),
        "SM 7.5", "--sm",
    ),
    "fp8 on SM 8.6": ("types-of-gpu", quantised(1.0, TensorProto.FLOAT8E4M3FN), "8.6", "fp16"),
}  # fmt: skip


@pytest.mark.parametrize("case", GRAPHS)
def test_a_graph_is_refused(case: str, tmp_path: Path) -> None:
    check, made, named, fix = GRAPHS[case]
    finding = found(made, tmp_path, ONE, sms=("8.9", "8.6", "7.5"))[check]
    assert named in finding.found and fix in finding.fix, str(finding)


def test_what_passes_beside_what_is_refused(tmp_path: Path) -> None:
    """The near misses of the table above."""
    fine = {
        "attention-fused-width": attention(576, 576, TRT_decomposable=1),
        "cache-mode": scatter([1, 1, 64, 24], mode="linear"),
        "scales": quantised(0.5),
        "types-of-gpu": quantised(1.0, TensorProto.INT8),
    }
    for check, made in fine.items():
        assert check not in found(made, tmp_path, ONE, sms=("8.6",))
    assert "types-of-gpu" not in found(
        quantised(1.0, TensorProto.FLOAT8E4M3FN), tmp_path, ONE, sms=("8.9", "12.0")
    )
    older = replace(RELEASE, name="10.3", opset=20)
    assert "20" in found(chain(("Relu", {})), tmp_path, ONE, release=older)["opset"].wanted


def test_an_error_inside_functions_names_the_way_to_it(tmp_path: Path) -> None:
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("my", 1)]
    body = [node("Elu", ["a"], ["c"], name="elu")]
    inner = helper.make_function("my", "Inner", ["a"], ["c"], body, opsets)
    outer = helper.make_function(
        "my", "Outer", ["a"], ["c"],
        [node("Relu", ["a"], ["b"]), node("Inner", ["b"], ["c"], domain="my", name="call")], opsets,
    )  # fmt: skip
    calls = [("Outer", {"domain": "my", "name": f"layer.{index}"}) for index in (0, 1)]
    made = chain(*calls, functions=[inner, outer])
    path = saved(made, tmp_path)
    told = [f.where for f in lint_graph(path, RELEASE, [ONE]) if f.check == "operator"]
    assert told == [f"layer.{i} (Outer) > call (Inner) > elu (Elu)" for i in (0, 1)]


def test_types_are_known_behind_an_operator_nobody_knows(tmp_path: Path) -> None:
    made = model(
        [node("TRT_Attention", ["x", "x", "x"], ["a"], domain="trt"),
         node("Add", ["a", "w"], ["y"], name="sum")],
        [("x", F16, [1, 4, 8, 16])], [("y", F16, [1, 4, 8, 16])],
        [weight("w", 16, dtype=np.float32)], domains=["trt"],
    )  # fmt: skip
    assert found(made, tmp_path)["types-alike"].where == "sum (Add)"


def test_a_tensor_that_nothing_makes(tmp_path: Path) -> None:
    made = chain(("Relu", {}))
    made.graph.node[0].input[0] = "undefined"
    finding = found(made, tmp_path, ONE)["dangling"]
    assert "undefined" in finding.found and "Relu" in finding.where


@pytest.mark.parametrize(("left", "check"), [(None, "weight-file"), (8, "weight-file"),
                                             (600, None)])  # fmt: skip
def test_weight_files(tmp_path: Path, left: int | None, check: str | None) -> None:
    path = saved(model([node("MatMul", ["x", "w"], ["y"])], [("x", F16, ["B", 16])],
                       [("y", F16, ["B", 16])], [weight("w", 16, 16)]), tmp_path)  # fmt: skip
    data = tmp_path / "decode.onnx.data"
    data.unlink()
    if left is not None:
        data.write_bytes(b"\0" * left)
    findings = lint_graph(path, RELEASE, [ONE])
    assert [finding.check for finding in findings] == ([check] if check else [])
    if check:
        assert "decode.onnx.data" in findings[0].found and "w" in findings[0].where


def test_a_tensor_shorter_than_its_shape(tmp_path: Path) -> None:
    path = saved(model([node("MatMul", ["x", "w"], ["y"])], [("x", F16, ["B", 16])],
                       [("y", F16, ["B", 16])], [weight("w", 16, 16)]), tmp_path)  # fmt: skip
    made = onnx.load(path, load_external_data=False)
    entries = {entry.key: entry for entry in made.graph.initializer[0].external_data}
    entries["length"].value = "100"
    path.write_bytes(made.SerializeToString())
    (finding,) = lint_graph(path, RELEASE, [ONE])
    assert (finding.check, finding.found) == ("weight-bytes", "100 bytes in 'decode.onnx.data'")
    assert finding.wanted.startswith("512")


PRODUCT = model([node("MatMul", ["a", "b"], ["y"], name="mm")],
                [("a", F16, ["B", 16]), ("b", F16, ["K", 8])], [("y", F16, ["B", 8])])  # fmt: skip
TWO = model([node("Add", ["x", "z"], ["y"])], [("x", F16, ["B", 16]), ("z", F16, ["B", 16])],
            [("y", F16, ["B", 16])])  # fmt: skip
PROFILES: dict[str, tuple[str, Any, Any, str, str]] = {
    "none": ("profile-missing", chain(("Relu", {})), None, "no profile", "x"),
    "input left out": ("profile-missing", TWO, ONE, "no sizes", "dynamic"),
    "unknown input": ("profile-unknown", chain(("Relu", {})), {**ONE, "zz": ((1,),) * 3}, "no such",
                      "correct"),
    "max below min": ("profile-order", chain(("Relu", {})), {"x": ((4, 16), (1, 16), (1, 16))},
                      "4..1", "order"),
    "another fixed size": ("profile-static", chain(("Relu", {})), {"x": ((1, 8),) * 3}, "8..8",
                           "that size"),
    "rank": ("profile-rank", chain(("Relu", {})), {"x": ((1,),) * 3}, "rank 1", "every axis"),
    "one word, two ranges": ("profile-word", TWO, {**ONE, "z": ((1, 16), (2, 16), (8, 16))},
                             "B = 1..8", "one range"),
    "product": ("profile-product", PRODUCT, {"a": ((1, 16),) * 3, "b": ((1, 8), (8, 8), (32, 8))},
                "16 columns times K rows", "one word"),
}  # fmt: skip


@pytest.mark.parametrize("case", PROFILES)
def test_a_profile_is_refused(case: str, tmp_path: Path) -> None:
    check, made, profile, named, fix = PROFILES[case]
    finding = found(made, tmp_path, *([profile] if profile else []))[check]
    assert named in finding.found and fix in finding.fix, str(finding)


def test_one_error_lists_the_findings(tmp_path: Path) -> None:
    path = saved(attention(24, 16, softcap=1.0), tmp_path)
    findings = lint_graph(path, RELEASE)
    with pytest.raises(InputError, match="2 things") as caught:
        require_clean(findings, "decode.onnx")
    assert caught.value.code == "BLD-LINT"
    assert [entry["check"] for entry in caught.value.details["findings"]] == [
        "attention-widths", "attention-softcap",
    ]  # fmt: skip
    require_clean((), "decode.onnx")


def test_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "decode.onnx").write_bytes(b"garbage")
    with pytest.raises(InputError, match="cannot be read") as caught:
        lint_graph(tmp_path / "decode.onnx", RELEASE)
    assert caught.value.code == "BLD-LINT"


def test_a_finding_reads_as_a_sentence() -> None:
    finding = LintFinding("top-k", "top (TopK)", "k = 4000", "at most 3840", "choose in two steps")
    assert str(finding) == (
        "top (TopK): k = 4000, wanted at most 3840; choose in two steps [top-k]"
    )
