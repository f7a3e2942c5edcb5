"""Faults of the blocks around attention: norms, residuals, weights, the head, whole layers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from mla_deploy.config import MlaConfig
from mla_deploy.validate.mutants.attention import layer_calls
from mla_deploy.validate.mutants.mutant import Edit, Mutant
from mla_deploy.validate.mutants.surgery import (
    Home,
    bypass,
    constant,
    formal,
    insert,
    layers,
    nodes,
    readers,
    wrap,
    wrap_reads,
)


def norm_dropped(suffix: str) -> Edit:
    """The norm with this weight passes its input on."""

    def edit(model: ir.Model, config: MlaConfig) -> int:
        homes: list[Home] = [model.graph, *layers(model)]
        weights = [formal(home, suffix) for home in homes]
        return sum(bypass(n) for w in weights for n in readers(w, "RMSNormalization"))

    return edit


def epsilon_of_another_model(model: ir.Model, config: MlaConfig) -> int:
    """A hundred times the epsilon."""
    found = [n for layer in layers(model) for n in nodes(layer, "RMSNormalization")]
    for node in found:
        epsilon = 100 * float(node.attributes["epsilon"].value)
        node.attributes["epsilon"] = ir.AttrFloat32("epsilon", epsilon)
    return len(found)


def attention_residual_dropped(model: ir.Model, config: MlaConfig) -> int:
    changed = 0
    for layer in layers(model):
        hidden = formal(layer, "hidden_states")
        for node in readers(hidden, "Add"):
            changed += bypass(node, 1 - list(node.inputs).index(hidden))
    return changed


def mlp_residual_dropped(model: ir.Model, config: MlaConfig) -> int:
    """The residual is the operand that the norm reads too."""
    changed = 0
    for layer in layers(model):
        last = layer.outputs[0].producer()
        if last is None or last.op_type != "Add":
            continue
        shared = [len(readers(value)) > 1 for value in last.inputs]
        if shared.count(True) == 1:
            changed += bypass(last, shared.index(False))
    return changed


def weight_misread(suffix: str) -> Edit:
    """[in, out] bytes read as [out, in]: the shape is right, the order is not."""

    def misread(node: ir.Node, weight: ir.Value) -> ir.Value:
        turned = insert(node, "Transpose", weight)
        return insert(node, "Reshape", turned, insert(node, "Shape", weight))

    return _weight_edit(suffix, misread)


def weight_scaled(suffix: str, factor: float) -> Edit:
    """A weight off by a little: the smallest fault that must be seen."""

    def scaled(node: ir.Node, weight: ir.Value) -> ir.Value:
        return insert(node, "Mul", weight, constant(node, factor, np.float32))

    return _weight_edit(suffix, scaled)


def weights_of_another_layer(suffix: str) -> Edit:
    """Two layers exchange a weight."""

    def edit(model: ir.Model, config: MlaConfig) -> int:
        places = []
        for call in layer_calls(model):
            function = model.functions[call.op_identifier()]
            names = [str(value.name) for value in function.inputs]
            places += [(call, i) for i, name in enumerate(names) if name.endswith(suffix)]
        if len(places) < 2:
            return 0
        (first, i), (second, j) = places[:2]
        one, other = first.inputs[i], second.inputs[j]
        first.replace_input_with(i, other)
        second.replace_input_with(j, one)
        return 2

    return edit


def layer_dropped(model: ir.Model, config: MlaConfig) -> int:
    """The last layer passes its input on."""
    call = layer_calls(model)[-1]
    call.outputs[0].replace_all_uses_with(call.inputs[0])  # type: ignore[arg-type]
    return 1


def last_token_off_by_one(model: ir.Model, config: MlaConfig) -> int:
    """The logits are of the token before the last."""

    def edit(node: ir.Node, index: ir.Value) -> ir.Value:
        earlier = insert(node, "Sub", index, constant(node, 1))
        return insert(node, "Max", earlier, constant(node, 0))

    return sum(wrap(node, 1, edit) for node in nodes(model.graph, "GatherElements"))


def _weight_edit(suffix: str, edit: Callable[[ir.Node, ir.Value], ir.Value]) -> Edit:
    def edit_all(model: ir.Model, config: MlaConfig) -> int:
        homes: list[Home] = [model.graph, *layers(model)]
        return sum(wrap_reads(formal(home, suffix), edit) for home in homes)

    return edit_all


MUTANTS = (
    Mutant(
        "latent-norm-dropped",
        norm_dropped("kv_a_layernorm.weight"),
        told="The latent is cached as it was projected.",
    ),
    Mutant(
        "query-norm-dropped",
        norm_dropped("q_a_layernorm.weight"),
        told="The query's latent is not normalised.",
    ),
    Mutant(
        "input-norm-dropped",
        norm_dropped("input_layernorm.weight"),
        told="Attention reads the residual as it is.",
    ),
    Mutant(
        "mlp-norm-dropped",
        norm_dropped("post_attention_layernorm.weight"),
        told="The MLP reads the residual as it is.",
    ),
    Mutant(
        "final-norm-dropped",
        norm_dropped("model.norm.weight"),
        told="The head reads the residual as it is.",
    ),
    Mutant(
        "final-norm-dropped-in-prefill-only",
        norm_dropped("model.norm.weight"),
        ("prefill",),
        told="The head reads the residual as it is.",
    ),
    Mutant("norm-epsilon-of-another-model", epsilon_of_another_model),
    Mutant(
        "attention-residual-dropped",
        attention_residual_dropped,
        told="Attention's output replaces the residual.",
    ),
    Mutant("mlp-residual-dropped", mlp_residual_dropped),
    Mutant(
        "output-weight-transposed",
        weight_misread(".o_proj.weight"),
        told="[in, out] bytes read as [out, in].",
    ),
    Mutant(
        "output-weight-off-by-0.1-percent",
        weight_scaled(".o_proj.weight", 1.001),
        told="A weight off by a little.",
    ),
    Mutant(
        "head-weight-off-by-0.1-percent",
        weight_scaled("lm_head.weight", 1.001),
        told="Logits off by a little.",
    ),
    Mutant(
        "output-weights-exchanged",
        weights_of_another_layer(".o_proj.weight"),
        told="Two layers exchange a weight.",
    ),
    Mutant("last-layer-dropped", layer_dropped),
    Mutant("last-token-off-by-one", last_token_off_by_one),
)
