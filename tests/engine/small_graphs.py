"""Small graphs for the builder: one absorbed decode layer, and pieces to break."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

F16, F32, I64 = TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.INT64
VOCAB, WIDTH, HEADS, LATENT, ROPE, CAPACITY = 32, 32, 4, 16, 8, 64
ROW = LATENT + ROPE
Value = tuple[str, int, Sequence[Any]]


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    weights: Sequence[onnx.TensorProto] = (),
    *,
    opset: int = 24,
    domains: Sequence[str] = (),
    functions: Sequence[onnx.FunctionProto] = (),
) -> onnx.ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
        list(weights),
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(name, 1) for name in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=list(functions))


def weight(name: str, *shape: int, dtype: Any = np.float16) -> onnx.TensorProto:
    values = np.random.default_rng(len(name)).standard_normal(shape).astype(dtype) / 8
    return numpy_helper.from_array(values.astype(dtype), name)


def constant(name: str, values: Any, dtype: Any = np.int64) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(values, dtype), name)


def node(operator: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> Any:
    name = attributes.pop("name", f"{operator}_{outputs[0]}")
    return helper.make_node(operator, list(inputs), list(outputs), name=name, **attributes)


def chain(*operators: tuple[str, dict[str, Any]], opset: int = 24, **more: Any) -> onnx.ModelProto:
    """x [B, 16] through one-input operators to y."""
    nodes, last = [], "x"
    for index, (operator, attributes) in enumerate(operators):
        nodes.append(node(operator, [last], [f"t{index}"], **attributes))
        last = f"t{index}"
    nodes.append(node("Identity", [last], ["y"]))
    domains = sorted({attributes.get("domain", "") for _, attributes in operators} - {""})
    return model(
        nodes, [("x", F16, ["B", 16])], [("y", F16, ["B", 16])], opset=opset, domains=domains,
        **more,
    )  # fmt: skip


def decode_layer(layers: int = 1) -> onnx.ModelProto:
    """The bundle's contract with `layers` absorbed layers: heads folded into rows, TensorScatter.

    input_ids, cache_lengths, new_lengths, latent_cache.{i} -> logits, latent_cache_out.{i}.
    """
    weights = [
        weight("embed", VOCAB, WIDTH), weight("head", WIDTH, VOCAB), constant("axis1", [1]),
        constant("fold", [0, -1, ROW]), constant("row4", [0, 1, -1, ROW]),
        constant("unfold", [0, -1, HEADS * LATENT]), constant("from", [0]),
        constant("to", [LATENT]), constant("last", [-1]), constant("row3", [0, CAPACITY, ROW]),
    ]  # fmt: skip
    nodes = [node("Gather", ["embed", "input_ids"], ["h0"])]
    inputs: list[Value] = [("input_ids", I64, ["batch", "new_tokens"])]
    inputs += [(name, I64, ["batch"]) for name in ("cache_lengths", "new_lengths")]
    outputs: list[Value] = [("logits", F32, ["batch", "new_tokens", VOCAB])]
    for i in range(layers):
        weights += [weight(f"wq{i}", WIDTH, HEADS * ROW), weight(f"wk{i}", WIDTH, ROW),
                    weight(f"wo{i}", HEADS * LATENT, WIDTH)]  # fmt: skip
        cache = f"latent_cache.{i}"
        kept = f"latent_cache_out.{i}"
        nodes += [
            node("MatMul", [f"h{i}", f"wk{i}"], [f"new{i}"]),
            node("Unsqueeze", [f"new{i}", "axis1"], [f"new4{i}"]),
            node("TensorScatter", [cache, f"new4{i}", "cache_lengths"], [kept], axis=-2),
            node("Reshape", [kept, "row3"], [f"rows{i}"]),
            node("MatMul", [f"h{i}", f"wq{i}"], [f"q{i}"]),
            node("Reshape", [f"q{i}", "fold"], [f"qf{i}"]),
            node("Transpose", [f"rows{i}"], [f"rt{i}"], perm=[0, 2, 1]),
            node("MatMul", [f"qf{i}", f"rt{i}"], [f"s{i}"]),
            node("Cast", [f"s{i}"], [f"s32{i}"], to=F32),
            node("Softmax", [f"s32{i}"], [f"p32{i}"]),
            node("Cast", [f"p32{i}"], [f"p{i}"], to=F16),
            node("MatMul", [f"p{i}", f"rows{i}"], [f"full{i}"]),
            node("Slice", [f"full{i}", "from", "to", "last"], [f"o{i}"]),
            node("Reshape", [f"o{i}", "unfold"], [f"of{i}"]),
            node("MatMul", [f"of{i}", f"wo{i}"], [f"a{i}"]),
            node("Add", [f"a{i}", f"h{i}"], [f"h{i + 1}"]),
        ]
        inputs.append((cache, F16, ["batch", 1, CAPACITY, ROW]))
        outputs.append((kept, F16, ["batch", 1, CAPACITY, ROW]))
    nodes += [node("MatMul", [f"h{layers}", "head"], ["l16"]),
              node("Cast", ["l16"], ["logits"], to=F32)]  # fmt: skip
    return model(nodes, inputs, outputs, weights)


def saved(made: onnx.ModelProto, folder: Path, name: str = "decode.onnx") -> Path:
    """On disk, every weight in `<name>.data` beside it."""
    path = folder / name
    onnx.save_model(
        made, path, save_as_external_data=True, location=f"{name}.data", size_threshold=0
    )
    return path
