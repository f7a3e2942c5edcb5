"""A fault in one layer alone: where layers share a function, it gets one of its own first."""

from __future__ import annotations

import onnx_ir as ir

from mla_deploy.config import MlaConfig
from mla_deploy.validate.mutants.attention import layer_calls
from mla_deploy.validate.mutants.mutant import Mutant


def in_layer(mutant: Mutant, layer: int) -> Mutant:
    """`mutant`, made in `layer` only, counted over the calls of layers."""

    def edit(model: ir.Model, config: MlaConfig) -> int:
        call = layer_calls(model)[layer]
        function = model.functions[call.op_identifier()].clone()
        function.name = f"{function.name}_alone"
        call.op_type = str(function.name)
        others = dict(model.functions)
        model.functions.clear()
        model.functions[function.identifier()] = function
        changed = mutant.edit(model, config)
        model.functions.update(others)
        return changed

    return Mutant(f"{mutant.name}-in-layer-{layer}", edit, mutant.graphs)
