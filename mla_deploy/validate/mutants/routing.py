"""Faults of the mixture of experts: routing, weights, order, the shared expert, activations."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir

from mla_deploy.config import MlaConfig
from mla_deploy.validate.mutants.attention import layer_calls
from mla_deploy.validate.mutants.mutant import Mutant
from mla_deploy.validate.mutants.surgery import (
    bypass,
    constant,
    downstream,
    formal,
    insert,
    known,
    layers,
    nodes,
    readers,
    reread,
    upstream,
    wrap,
)

_EXPERT = re.compile(r"experts\.(\d+)\.(\w+)\.weight$")


def experts_rotated(model: ir.Model, config: MlaConfig) -> int:
    """Expert e has the weights of expert e + 1."""
    return _renamed(model, lambda e, part: ((e + 1) % config.num_experts, part))


def gate_and_up_exchanged(model: ir.Model, config: MlaConfig) -> int:
    """The two halves of a fused gate_up tensor in the other order."""
    other = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    return _renamed(model, lambda e, part: (e, other.get(part, part)))


def shared_expert_dropped(model: ir.Model, config: MlaConfig) -> int:
    changed = 0
    for layer in layers(model):
        weight = formal(layer, "shared_experts.down_proj.weight")
        total = downstream(weight, "Add")
        if weight is None or total is None:
            continue
        shared = [
            any(weight in node.inputs for node in upstream(value, "Gemm")) for value in total.inputs
        ]
        changed += bypass(total, shared.index(False))
    return changed


def routed_scaling_dropped(model: ir.Model, config: MlaConfig) -> int:
    factor = float(config.raw.get("routed_scaling_factor") or 1.0)
    changed = 0
    for layer in _sparse(model):
        for node in nodes(layer, "Mul"):
            for index, value in enumerate(node.inputs):
                found = known(value)
                if found is not None and found.size == 1 and found.item() == np.float32(factor):
                    changed += bypass(node, 1 - index) if factor != 1.0 else 0
    return changed


def bias_dropped(model: ir.Model, config: MlaConfig) -> int:
    """Experts are chosen by the plain scores."""
    return sum(bypass(node, index) for _, node, index in _biased(model))


def bias_kept_in_weights(model: ir.Model, config: MlaConfig) -> int:
    """The correction bias is for choosing only, not for weighing."""
    changed = 0
    for _, node, index in _biased(model):
        scores = node.inputs[index]
        for gather in readers(scores, "GatherElements"):
            reread(gather, scores, node.outputs[0])  # type: ignore[arg-type]
            changed += 1
    return changed


def weights_not_normalised(model: ir.Model, config: MlaConfig) -> int:
    """The chosen weights do not sum to one."""
    found = [node for layer in _sparse(model) for node in nodes(layer, "Div")]
    routing = [n for n in found if next(upstream(n.inputs[0], "GatherElements"), None) is not None]
    return sum(bypass(node) for node in routing)


def groups_ignored(model: ir.Model, config: MlaConfig) -> int:
    """Experts of every group may be chosen."""
    changed = 0
    for layer in _sparse(model):
        for top in nodes(layer, "TopK"):
            masked = top.inputs[0].producer() if top.inputs[0] is not None else None
            if masked is not None and masked.op_type == "Where":
                changed += bypass(masked, 2)
    return changed


def router_softmax(model: ir.Model, config: MlaConfig) -> int:
    """DeepSeek-V2's router in the place of V3's sigmoid."""
    changed = 0
    for _, node, index in _biased(model):
        sigmoid = node.inputs[index].producer()  # type: ignore[union-attr]
        if sigmoid is None or sigmoid.op_type != "Sigmoid":
            continue
        softmax = insert(sigmoid, "Softmax", sigmoid.inputs[0], axis=-1)  # type: ignore[arg-type]
        sigmoid.outputs[0].replace_all_uses_with(softmax)
        changed += 1
    return changed


def other_activation(model: ir.Model, config: MlaConfig) -> int:
    """x sigmoid(1.702 x) in the place of x sigmoid(x)."""
    changed = 0
    for layer in layers(model):
        for node in nodes(layer, "Sigmoid"):
            x = node.inputs[0]
            if any(x in product.inputs for product in readers(node.outputs[0], "Mul")):
                wrap(node, 0, lambda n, v: insert(n, "Mul", v, constant(n, 1.702, np.float32)))
                changed += 1
    return changed


def _sparse(model: ir.Model) -> list[ir.Function]:
    return [layer for layer in layers(model) if formal(layer, "experts.0.down_proj.weight")]


def _biased(model: ir.Model) -> Iterator[tuple[ir.Function, ir.Node, int]]:
    """(layer, Add of the correction bias, index of its scores)."""
    for layer in layers(model):
        bias = formal(layer, "e_score_correction_bias")
        for node in readers(bias, "Add"):
            yield layer, node, 1 - list(node.inputs).index(bias)


def _renamed(model: ir.Model, rename: Callable[[int, str], tuple[int, str]]) -> int:
    """Hand each call of a sparse layer the expert weights that `rename` says."""
    changed = 0
    for call in layer_calls(model):
        names = [str(v.name) for v in model.functions[call.op_identifier()].inputs]
        found = {name: m for name in names if (m := _EXPERT.search(name)) is not None}
        place = {(int(m[1]), m[2]): names.index(name) for name, m in found.items()}
        given = {key: call.inputs[index] for key, index in place.items()}
        for key, index in place.items():
            call.replace_input_with(index, given[rename(*key)])
            changed += rename(*key) != key
    return changed


MUTANTS = (
    Mutant("experts-in-another-order", experts_rotated),
    Mutant("experts-in-another-order-in-decode-only", experts_rotated, ("decode",)),
    Mutant("expert-gate-and-up-exchanged", gate_and_up_exchanged),
    Mutant("shared-expert-dropped", shared_expert_dropped, told="Only the routed experts count."),
    Mutant(
        "routed-scaling-dropped",
        routed_scaling_dropped,
        told="The routed experts' sum is not scaled.",
    ),
    Mutant("router-bias-dropped", bias_dropped),
    Mutant("router-bias-kept-in-weights", bias_kept_in_weights),
    Mutant("router-weights-not-normalised", weights_not_normalised),
    Mutant("router-groups-ignored", groups_ignored),
    Mutant("router-softmax-for-sigmoid", router_softmax),
    Mutant("activation-of-another-model", other_activation),
)
