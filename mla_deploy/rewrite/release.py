"""What one TensorRT release line takes: its opset, its operators, and the rules that lower to them.

A table for each line stands in a module of its own (`trt_10_3.py` and so on), `releases.py` lists
them. Operators of the default domain are bare words, others `domain::Operator`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from mla_deploy.errors import InputError, MlaDeployError
from mla_deploy.rewrite.rule import DOMAIN

Rules = tuple[Any, ...]

# What every line since 10.3 takes, as far as our graphs need it.
PRIMITIVES = frozenset(
    {
        "Abs", "Add", "And", "Cast", "Clip", "Concat", "Constant", "ConstantOfShape", "Cos",
        "DequantizeLinear", "Div",
        "Equal", "Erf", "Exp", "Expand", "Gather", "GatherElements", "GatherND", "Gelu", "Gemm",
        "Greater", "GreaterOrEqual", "Identity", "LayerNormalization", "Less", "LessOrEqual", "Log",
        "MatMul", "Max", "QuantizeLinear",
        "Min", "Mod", "Mul", "Neg", "Not", "Or", "Pad", "Pow", "Range", "Reciprocal", "ReduceMax",
        "ReduceMean", "ReduceMin", "ReduceSum", "ReduceSumSquare", "Relu", "Reshape",
        "ScatterElements", "ScatterND", "Shape", "Sigmoid", "Sin", "Slice", "Softmax", "Softplus",
        "Split", "Sqrt", "Squeeze", "Sub", "Tanh", "TopK", "Transpose", "Unsqueeze", "Where", "Xor",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Release:
    """One release line. `prefill`, `decode` and `trunk` are applied in order, as `order.py` does.

    `composites` are those of our domain that the rules lower; a model with another is refused.
    `has_tensor_scatter`: the cache is updated in place by TensorScatter, which becomes
    KVCacheUpdate. `has_plugin_override`: a plugin can take the place of a model-local function.
    """

    name: str
    opset: int
    ir_version: int
    operators: frozenset[str]
    composites: frozenset[str]
    prefill: Rules
    decode: Rules
    trunk: Rules
    has_tensor_scatter: bool
    has_plugin_override: bool


def require_composites(release: Release, found: set[str]) -> None:
    """`found` are the composites of a traced model.

    Raises: InputError REW-TARGET naming those that the release has no lowering for.
    """
    missing = sorted(found - release.composites)
    if missing:
        raise InputError(
            "REW-TARGET",
            f"this model needs {', '.join(missing)}, which has no lowering for TensorRT "
            f"{release.name} yet; lowered are {', '.join(sorted(release.composites))}",
            hint="export with `--target cpu`, which has all of them",
            release=release.name,
            composites=missing,
        )


def require_operators(release: Release, model: ir.Model) -> None:
    """Raises: MlaDeployError REW-OPERATOR when a graph holds what the release's table lacks."""
    called = {function.identifier()[:2] for function in model.functions.values()}
    found = {
        f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        for node in _nodes(model)
        if (node.domain, node.op_type) not in called
    }
    outside = sorted(found - release.operators)
    if outside:
        raise MlaDeployError(
            "REW-OPERATOR",
            f"the lowered graph holds {', '.join(outside)}, not in the table of TensorRT "
            f"{release.name}",
            hint="a part of this model is lowered to an operator that the release lacks; please "
            "report it",
            operators=outside,
        )


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        yield from ir.traversal.RecursiveGraphIterator(graph)


def composites_of(models: Iterator[ir.Model]) -> set[str]:
    """The composites that traced layers hold."""
    return {node.op_type for model in models for node in model.graph if node.domain == DOMAIN}
