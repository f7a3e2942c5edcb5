"""Types in a strongly typed network: nothing is cast for you, and each GPU has its own."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from mla_deploy.engine.flat_graph import FlatNode, constant_of
from mla_deploy.engine.lint_finding import LintFinding, Subject

# Operators whose listed inputs have one type, floating point or not.
_ALIKE: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Pow", "MatMul", "Equal", "Greater", "Less",
                     "GreaterOrEqual", "LessOrEqual", "PRelu", "Mod"), (0, 1)),
    **dict.fromkeys(("Max", "Min", "Sum", "Concat", "Einsum"), tuple(range(64))),
    "Gemm": (0, 1, 2), "Where": (1, 2), "ScatterND": (0, 2), "ScatterElements": (0, 2),
    "TensorScatter": (0, 1), "Attention": (0, 1, 2), "trt::TRT_Attention": (0, 1, 2),
}  # fmt: skip
_ROPE = ("RotaryEmbedding",)
_SCALED = ("QuantizeLinear", "DequantizeLinear")
_FIRST_FP32_PRODUCT = (8, 0)
_NEEDS_SM = {
    ir.DataType.FLOAT8E4M3FN: (8, 9),
    ir.DataType.FLOAT8E5M2: (8, 9),
    ir.DataType.FLOAT4E2M1: (10, 0),
}


def types_alike(subject: Subject) -> Iterator[LintFinding]:
    """Both sides of a sum or a product are of one type."""
    for node in subject.graph.nodes:
        if node.operator in _ALIKE:
            yield from _clash(node, _ALIKE[node.operator], "types-alike", "put a Cast before it")


def rotation_types(subject: Subject) -> Iterator[LintFinding]:
    """cos and sin are stored in the type of what they turn."""
    for node in subject.graph.named(*_ROPE):
        yield from _clash(node, (0, 1, 2), "rotation-types", "store cos and sin in that type")


def scales(subject: Subject) -> Iterator[LintFinding]:
    """Scales of Q/DQ are finite and positive; the values are read, they are small."""
    for node in subject.graph.named(*_SCALED):
        found = constant_of(node.input(1))
        if found is None or found.size == 0:
            continue
        lowest = float(np.min(found.astype(np.float32)))
        if not lowest > 0:
            yield LintFinding(
                "scales", node.path, f"a scale of {lowest:g}", "positive scales",
                "quantise again; a row of zeros takes any positive scale",
            )  # fmt: skip


def types_of_gpu(subject: Subject) -> Iterator[LintFinding]:
    """fp8 from SM 8.9, fp4 from SM 10.0: the builder says so minutes later."""
    used: dict[ir.DataType, str] = {}
    for value in (*subject.graph.initializers, *subject.graph.inputs):
        if value.dtype in _NEEDS_SM:
            used.setdefault(value.dtype, f"{value.name}")
    for node in subject.graph.nodes:
        for output in node.node.outputs:
            if output.dtype in _NEEDS_SM:
                used.setdefault(output.dtype, node.path)
    for dtype, where in used.items():
        major, minor = _NEEDS_SM[dtype]
        old = [sm for sm in subject.sms if _version(sm) < (major, minor)]
        if old:
            yield LintFinding(
                "types-of-gpu", where, f"{dtype.name.lower()} on SM {', '.join(old)}",
                f"SM {major}.{minor} or newer", "export with --dtype fp16 for this GPU",
            )  # fmt: skip


def products_of_gpu(subject: Subject) -> Iterator[LintFinding]:
    """SM 7.5 has no fp32 products; a router of experts is one."""
    old = [sm for sm in subject.sms if _version(sm) < _FIRST_FP32_PRODUCT]
    if not old:
        return
    for node in subject.graph.named("MatMul", "Gemm"):
        left = node.input(0)
        if left is not None and left.dtype == ir.DataType.FLOAT:
            yield LintFinding(
                "products-of-gpu", node.path, f"a product in fp32 on SM {', '.join(old)}",
                "SM 8.0 or newer", "leave that --sm out",
            )  # fmt: skip


def _clash(node: FlatNode, indices: tuple[int, ...], check: str, fix: str) -> Iterator[LintFinding]:
    values = [node.input(index) for index in indices if index < len(node.node.inputs)]
    types = [value.dtype for value in values if value is not None and value.dtype is not None]
    if len(set(types)) > 1:
        names = " and ".join(dict.fromkeys(dtype.name.lower() for dtype in types))
        yield LintFinding(check, node.path, f"inputs of {names}", "one type", fix)


def _version(sm: str) -> tuple[int, int]:
    major, _, minor = sm.partition(".")
    return int(major), int(minor or 0)
