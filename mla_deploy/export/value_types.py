"""Types of the values inside a finished graph."""

from __future__ import annotations

import onnx_ir as ir

from mla_deploy.rewrite.rule import DOMAIN


def forget_types(model: ir.Model) -> None:
    """Drop the tracer's types of inner values: they are fp32's, and a runtime infers its own."""
    kept = {*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()}
    for call in model.graph:
        if call.domain == DOMAIN:
            kept.update(call.outputs)  # ours: a reader needs not look into a layer for them
    nodes = [*model.graph.all_nodes()]
    for function in model.functions.values():
        nodes.extend(function.all_nodes())
    for node in nodes:
        for value in node.outputs:
            if value not in kept:
                value.type = None
                value.shape = None
